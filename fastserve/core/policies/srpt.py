"""Shortest remaining processing time: the clairvoyant bound that no blind policy beats.

It is handed the true output lengths, so only benchmarks and the simulator can use it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from fastserve.core.cost_model import CostModel
from fastserve.core.policies.parts import SortedRequests
from fastserve.core.policies.protocol import Coldness
from fastserve.core.policies.reservation import ON_DEMAND
from fastserve.core.request import FinishReason, Request


class SRPT:
    """Requests sorted by the seconds they would still need alone on the machine."""

    reservation = ON_DEMAND
    levels = None
    predictions = None

    def __init__(self, cost_model: CostModel, lengths: Mapping[int, int]) -> None:
        """`lengths` maps a handle to its true number of output tokens."""
        self._cost_model = cost_model
        self._lengths = lengths
        self._requests: SortedRequests[float] = SortedRequests()

    def admit(self, request: Request, now: float) -> None:
        """Insert by remaining time."""
        self._requests.put(request, self._seconds_left(request))

    def ran(self, requests: Sequence[Request], now: float) -> None:
        """Move those that ran forward."""
        for request in requests:
            self._requests.put(request, self._seconds_left(request))

    def finished(self, request: Request, reason: FinishReason) -> None:
        """Leave the order."""
        self._requests.discard(request)

    def move(self, request: Request, to: SRPT) -> None:
        """Leave this order for the other."""
        to._requests.put(request, self._requests.discard(request))

    def advance(self, now: float) -> None:
        """Time does not change the order."""

    def next_event(self, now: float) -> float:
        """Return inf."""
        return math.inf

    def ordered(self) -> Iterator[Request]:
        """Yield by remaining time, then by arrival."""
        return iter(self._requests)

    def coldness(self, request: Request, now: float) -> Coldness:
        """Return the seconds left to compute: those with less run first."""
        return (self._requests.key(request),)

    def estimated_next_schedule_time(self, request: Request, now: float) -> None:
        """The order is by work left, not by the time until it begins."""

    def _seconds_left(self, request: Request) -> float:
        end = request.num_prompt_tokens + self._lengths[request.handle]
        seconds, start = 0.0, request.num_computed_tokens
        if request.num_tokens - start > 1:
            seconds += self._cost_model.iteration_s(request.num_tokens - start, start)
            start = request.num_tokens
        num_decodes = max(end - 1 - start, 0)
        middle = start + num_decodes // 2
        return seconds + num_decodes * self._cost_model.iteration_s(1, middle)
