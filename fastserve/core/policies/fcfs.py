"""First come, first served, run to completion: Orca's order, vLLM's default.

The baseline. A request that has begun is only ever preempted when KV blocks run out, and then
the youngest loses.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastserve.core.policies.protocol import PolicyStats, StepBill
from fastserve.core.request import Request


class FCFS:
    """One queue in order of arrival."""

    keeps_order = True

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}

    def admit(self, request: Request, now: float) -> None:
        """Join the tail, or the old place on the way back from another priority class."""
        is_back = bool(self._requests) and request.handle < next(reversed(self._requests))
        self._requests[request.handle] = request
        if is_back:
            self._requests = dict(sorted(self._requests.items()))

    def charge(self, bill: StepBill, now: float) -> None:
        """Time does not change the order."""

    def remove(self, request: Request) -> None:
        """Leave the queue."""
        del self._requests[request.handle]

    def ordered(self, now: float) -> Iterator[Request]:
        """Yield by arrival."""
        return iter(self._requests.values())

    def estimated_next_schedule_time(self, request: Request, now: float) -> float:
        """Return the distance to the oldest request: only its order means anything."""
        return float(request.handle - next(iter(self._requests)))

    def reserve_tokens(self, request: Request) -> int:
        """Blocks are taken on demand."""
        return 0

    def level(self, request: Request) -> int:
        """There is one queue."""
        return 0

    def stats(self) -> PolicyStats:
        """Return the length of the queue."""
        return PolicyStats(0, 0, {0: len(self._requests)} if self._requests else {})
