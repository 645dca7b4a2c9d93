"""Fixed priority by prompt length: the shorter the prefill, the higher, for life.

A baseline of the paper: it uses what is known (the prompt) and learns nothing (the output).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from fastserve.core.policies.parts import SortedRequests
from fastserve.core.policies.protocol import Coldness
from fastserve.core.policies.reservation import ON_DEMAND
from fastserve.core.request import FinishReason, Request


class FixedPriority:
    """Requests sorted by prompt length, then by arrival."""

    reservation = ON_DEMAND
    levels = None
    predictions = None

    def __init__(self) -> None:
        self._requests: SortedRequests[float] = SortedRequests()

    def admit(self, request: Request, now: float) -> None:
        """Insert by prompt length."""
        self._requests.put(request, request.num_prompt_tokens)

    def ran(self, requests: Sequence[Request], now: float) -> None:
        """Work done does not change the order."""

    def finished(self, request: Request, reason: FinishReason) -> None:
        """Leave the order."""
        self._requests.discard(request)

    def move(self, request: Request, to: FixedPriority) -> None:
        """Leave this order for the other."""
        to._requests.put(request, self._requests.discard(request))

    def advance(self, now: float) -> None:
        """Time does not change the order."""

    def next_event(self, now: float) -> float:
        """Return inf."""
        return math.inf

    def ordered(self) -> Iterator[Request]:
        """Yield the shortest prompts first."""
        return iter(self._requests)

    def coldness(self, request: Request, now: float) -> Coldness:
        """Return the prompt length."""
        return (request.num_prompt_tokens,)

    def estimated_next_schedule_time(self, request: Request, now: float) -> None:
        """Nothing tells how long those ahead will run."""
