"""Shortest remaining processing time: the clairvoyant bound that no blind policy beats.

It is handed the true output lengths, so only benchmarks and the simulator can use it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping

from fastserve.core.cost_model import CostModel
from fastserve.core.policies.protocol import PolicyStats, StepBill
from fastserve.core.request import Request


class SRPT:
    """Requests sorted by the seconds they would still need alone on the machine."""

    keeps_order = False

    def __init__(self, cost_model: CostModel, lengths: Mapping[int, int]) -> None:
        """`lengths` maps a handle to its true number of output tokens."""
        self._cost_model = cost_model
        self._lengths = lengths
        self._requests: dict[int, Request] = {}
        self._remaining_s: dict[int, float] = {}
        self._order: list[tuple[float, int]] = []

    def admit(self, request: Request, now: float) -> None:
        """Insert by remaining time."""
        self._requests[request.handle] = request
        self._insert(request)

    def charge(self, bill: StepBill, now: float) -> None:
        """Move those that ran forward."""
        for request, _ in bill.shares:
            self._discard(request)
            self._insert(request)

    def remove(self, request: Request) -> None:
        """Leave the order."""
        self._discard(request)
        del self._requests[request.handle], self._remaining_s[request.handle]

    def ordered(self, now: float) -> Iterator[Request]:
        """Yield by remaining time, then by arrival."""
        return (self._requests[handle] for _, handle in self._order)

    def estimated_next_schedule_time(self, request: Request, now: float) -> float:
        """Return the remaining time: those with less run first."""
        return self._remaining_s[request.handle]

    def reserve_tokens(self, request: Request) -> int:
        """Blocks are taken on demand."""
        return 0

    def level(self, request: Request) -> int:
        """There is one queue."""
        return 0

    def stats(self) -> PolicyStats:
        """Return the length of the queue."""
        return PolicyStats(0, 0, {0: len(self._requests)} if self._requests else {})

    def _insert(self, request: Request) -> None:
        remaining_s = self._seconds_left(request)
        self._remaining_s[request.handle] = remaining_s
        insort(self._order, (remaining_s, request.handle))

    def _discard(self, request: Request) -> None:
        key = (self._remaining_s[request.handle], request.handle)
        del self._order[bisect_left(self._order, key)]

    def _seconds_left(self, request: Request) -> float:
        end = request.num_prompt_tokens + self._lengths[request.handle]
        seconds, start = 0.0, request.num_computed_tokens
        if request.num_tokens - start > 1:
            seconds += self._cost_model.iteration_s(request.num_tokens - start, start)
            start = request.num_tokens
        num_decodes = max(end - 1 - start, 0)
        middle = start + num_decodes // 2
        return seconds + num_decodes * self._cost_model.iteration_s(1, middle)
