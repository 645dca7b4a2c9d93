"""Priority classes: one inner policy per user `priority`, lower values first.

Every request belongs to the class it asked for, clamped to ±100. One that has not run for
`aging_s` seconds is lifted by one class at a time until it runs, so no class waits for ever: with c
classes above it, a request heads for the first class within c · aging_s. After it has run it
returns to its own class.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from itertools import chain

from fastserve.core.policies.protocol import Policy, PolicyStats, Share, StepBill
from fastserve.core.request import Request

MAX_PRIORITY = 100


class PriorityClasses:
    """Strict order between classes, the inner policy's within one."""

    def __init__(self, make_policy: Callable[[], Policy], aging_s: float) -> None:
        self._make_policy = make_policy
        self._aging_s = aging_s
        self._classes: dict[int, Policy] = {}
        self._class_of: dict[int, int] = {}
        self._members: dict[int, Request] = {}
        self._ranks: list[int] = []
        self._last_ran_at: dict[int, float] = {}
        self._deadlines: list[tuple[float, int]] = []  # lazy: `_due` says which entry counts
        self._due: dict[int, float] = {}
        self._lifted: set[int] = set()

    @property
    def keeps_order(self) -> bool:
        """Whether the inner policy does."""
        return any(policy.keeps_order for policy in self._classes.values())

    def admit(self, request: Request, now: float) -> None:
        """Join the class of the request's priority."""
        self._members[request.handle] = request
        self._last_ran_at[request.handle] = now
        self._join(request, self._own_class(request), now)
        if len(self._ranks) > 1:
            self._watch(request.handle, now + self._aging_s)

    def charge(self, bill: StepBill, now: float) -> None:
        """Bill each class for its members, and send the lifted home."""
        if len(self._ranks) == 1:
            self._classes[self._ranks[0]].charge(bill, now)
            return
        parts: dict[int, list[Share]] = {}
        for share in bill.shares:
            handle = share[0].handle
            self._last_ran_at[handle] = now
            parts.setdefault(self._class_of[handle], []).append(share)
        for rank, shares in parts.items():
            self._classes[rank].charge(StepBill(bill.device_s, shares), now)
        for request, _ in bill.shares:
            if request.handle in self._lifted:
                self._lifted.discard(request.handle)
                self._move(request, self._own_class(request), now)
                self._watch(request.handle, now + self._aging_s)

    def remove(self, request: Request) -> None:
        """Leave the class."""
        self._classes[self._class_of.pop(request.handle)].remove(request)
        del self._members[request.handle], self._last_ran_at[request.handle]
        self._due.pop(request.handle, None)
        self._lifted.discard(request.handle)

    def ordered(self, now: float) -> Iterator[Request]:
        """Yield class by class."""
        if len(self._ranks) > 1:
            self._lift_waiting(now)
        return chain.from_iterable(self._classes[rank].ordered(now) for rank in self._ranks)

    def estimated_next_schedule_time(self, request: Request, now: float) -> float:
        """Return the inner estimate, behind everything of the classes above."""
        rank = self._class_of[request.handle]
        inner = self._classes[rank].estimated_next_schedule_time(request, now)
        if len(self._ranks) == 1:
            return inner
        # Squeezed below the span of a class: the coldest of one is warmer than any of the next.
        return self._aging_s * (self._ranks.index(rank) + inner / (inner + self._aging_s))

    def reserve_tokens(self, request: Request) -> int:
        """Return what the class reserves."""
        return self._classes[self._class_of[request.handle]].reserve_tokens(request)

    def level(self, request: Request) -> int:
        """Return the level within the class."""
        return self._classes[self._class_of[request.handle]].level(request)

    def stats(self) -> PolicyStats:
        """Return the sums over the classes."""
        parts = [policy.stats() for policy in self._classes.values()]
        sizes: dict[int, int] = {}
        for part in parts:
            for level, size in part.requests_by_level.items():
                sizes[level] = sizes.get(level, 0) + size
        return PolicyStats(
            sum(part.num_demotions for part in parts),
            sum(part.num_promotions for part in parts),
            sizes,
        )

    @staticmethod
    def _own_class(request: Request) -> int:
        return max(-MAX_PRIORITY, min(MAX_PRIORITY, request.priority))

    def _join(self, request: Request, rank: int, now: float) -> None:
        if rank not in self._classes:
            self._classes[rank] = self._make_policy()
            self._ranks = sorted(self._classes)
            if len(self._ranks) == 2:
                self._begin_aging(now)
        self._class_of[request.handle] = rank
        self._classes[rank].admit(request, now)

    def _move(self, request: Request, rank: int, now: float) -> None:
        self._classes[self._class_of[request.handle]].remove(request)
        self._join(request, rank, now)

    def _begin_aging(self, now: float) -> None:
        """Watch those who came while there was nothing above or below them."""
        for handle in self._members:
            self._last_ran_at[handle] = now
            self._watch(handle, now + self._aging_s)

    def _watch(self, handle: int, due: float) -> None:
        self._due[handle] = due
        heapq.heappush(self._deadlines, (due, handle))
        if len(self._deadlines) > 64 + 2 * len(self._due):
            self._deadlines = sorted((due, handle) for handle, due in self._due.items())

    def _lift_waiting(self, now: float) -> None:
        """Lift by one class whoever has waited for `aging_s` in its present one."""
        while self._deadlines and self._deadlines[0][0] <= now:
            due, handle = heapq.heappop(self._deadlines)
            if self._due.get(handle) != due:
                continue
            request = self._members[handle]
            position = self._ranks.index(self._class_of[handle])
            waits_until = self._last_ran_at[handle] + self._aging_s
            if handle not in self._lifted and waits_until > now:
                self._watch(handle, waits_until)
            elif position == 0 or request.steps_in_flight:
                self._watch(handle, now + self._aging_s)
            else:
                self._lifted.add(handle)
                self._move(request, self._ranks[position - 1], now)
                self._watch(handle, now + self._aging_s)
