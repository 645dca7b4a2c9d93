"""Fixed priority by prompt length: the shorter the prefill, the higher, for life.

A baseline of the paper: it uses what is known (the prompt) and learns nothing (the output).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from fastserve.core.policies.protocol import PolicyStats, StepBill
from fastserve.core.request import Request


class FixedPriority:
    """Requests sorted by prompt length, then by arrival."""

    keeps_order = False

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}
        self._order: list[tuple[int, int]] = []

    def admit(self, request: Request, now: float) -> None:
        """Insert by prompt length."""
        self._requests[request.handle] = request
        insort(self._order, (request.num_prompt_tokens, request.handle))

    def charge(self, bill: StepBill, now: float) -> None:
        """Time does not change the order."""

    def remove(self, request: Request) -> None:
        """Leave the order."""
        del self._requests[request.handle]
        key = (request.num_prompt_tokens, request.handle)
        del self._order[bisect_left(self._order, key)]

    def ordered(self, now: float) -> Iterator[Request]:
        """Yield the shortest prompts first."""
        return (self._requests[handle] for _, handle in self._order)

    def estimated_next_schedule_time(self, request: Request, now: float) -> float:
        """Return the prompt length: only its order means anything."""
        return float(request.num_prompt_tokens)

    def reserve_tokens(self, request: Request) -> int:
        """Blocks are taken on demand."""
        return 0

    def level(self, request: Request) -> int:
        """There is one queue."""
        return 0

    def stats(self) -> PolicyStats:
        """Return the length of the queue."""
        return PolicyStats(0, 0, {0: len(self._requests)} if self._requests else {})
