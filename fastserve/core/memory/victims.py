"""Victims: which request loses its KV first, the coldest by the policy.

Rules: ranking n holders of KV asks the policy n times, so a ranking serves for n / 64 plans and the
cost per plan is bounded. Within them it goes stale in one way: a request that has become colder
since is not moved up. Whether a ranked request may lose KV is checked again before it is named.
Must not know: why blocks are needed, how many there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

from fastserve.core.policies.protocol import Policy
from fastserve.core.request import Request

NUM_RANKED_PER_PLAN = 64


class VictimRanking:
    """Holders of KV, coldest last."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._ranked: list[Request] = []
        self._spared: deque[Request] = deque()  # of the ranked, those that are safe
        self._num_plans_left = 0
        self._is_fresh = False
        self._now = 0.0

    def begin_plan(self, now: float) -> None:
        """Note that time has moved on since the last ranking."""
        self._now = now
        self._is_fresh = False
        self._num_plans_left -= 1
        if self._num_plans_left < 0:
            self._ranked.clear()
            self._spared.clear()

    def find(
        self, claimant: Request, scanned: Collection[int], holders: Iterable[Request]
    ) -> Request | None:
        """Return the coldest of the holders, if it may lose its KV to the claimant.

        None of the `scanned` handles is named; the claimant is one of them. If it is the only one,
        it heads the order and may take from any other; else only from those that are not safe, and
        unless it is itself, that are no warmer than itself.
        """
        is_head = len(scanned) == 1
        comes_back = claimant.table is not None and not claimant.table.is_resident
        victim = self._coldest(scanned, holders, takes_safe=is_head or not comes_back)
        if victim is None or is_head or claimant.is_safe:
            return victim
        coldness = self._policy.coldness
        is_colder = coldness(victim, self._now) >= coldness(claimant, self._now)
        return victim if is_colder else None

    @property
    def has_spared(self) -> bool:
        """Whether somebody was not named because it is safe."""
        return bool(self._spared)

    def pass_over(self, victim: Request) -> None:
        """Name another than the last one in its place."""
        ranked = self._ranked if self._ranked and self._ranked[-1] is victim else self._spared
        assert ranked.pop() is victim

    def reconsider(self) -> None:
        """Rank anew those who could not give way, or were passed over."""
        self._is_fresh = False

    def _coldest(
        self, excluded: Collection[int], holders: Iterable[Request], *, takes_safe: bool
    ) -> Request | None:
        """Return the coldest holder, the youngest among equals; those that are safe come last."""
        while True:
            while self._ranked:
                request = self._ranked[-1]
                if not self._may_lose(request) or request.handle in excluded:
                    self._ranked.pop()
                elif request.is_safe:
                    self._spared.appendleft(self._ranked.pop())
                else:
                    return request
            while self._spared and takes_safe:
                request = self._spared[-1]
                if self._may_lose(request) and request.handle not in excluded:
                    return request
                self._spared.pop()
            if self._is_fresh:
                return None
            self._rank(excluded, holders)

    def _rank(self, excluded: Collection[int], holders: Iterable[Request]) -> None:
        coldness, now = self._policy.coldness, self._now
        self._ranked = sorted(
            (r for r in holders if self._may_lose(r) and r.handle not in excluded),
            key=lambda request: (*coldness(request, now), request.handle),
        )
        self._is_fresh = True
        self._num_plans_left = len(self._ranked) // NUM_RANKED_PER_PLAN

    @staticmethod
    def _may_lose(request: Request) -> bool:
        # One that recomputes is exempt: it would lose the same KV again and again.
        table = request.table
        return not (
            table is None or table.is_drained or table.is_draining or request.is_recomputing
        )
