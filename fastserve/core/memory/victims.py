"""Victims: which request loses its KV first: what gave way before, then the coldest by the policy.

Rules: ranking n holders of KV asks the policy n times, so a ranking serves for n / 64 plans and the
cost per plan is bounded. Within them it goes stale in one way: a request that has become colder
since is not moved up. Whether a ranked request may lose KV is checked again before it is named.
Must not know: why blocks are needed, how many there are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from fastserve.core.memory.ranking import by_coldness
from fastserve.core.policies.protocol import Policy
from fastserve.core.request import Request

NUM_RANKED_PER_PLAN = 64


class VictimRanking:
    """Holders of KV, coldest last; those that gave way before are ranked apart."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._ranked: list[Request] = []
        self._leftovers: list[Request] = []
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
            self._leftovers.clear()

    def find(
        self, claimant: Request, scanned: Collection[int], holders: Iterable[Request]
    ) -> Request | None:
        """Return the holder that is to lose KV first, if it may lose it to the claimant.

        None of the `scanned` handles is named; the claimant is one of them. What is left of one
        that gave way goes first, and to any: no step uses it. If the claimant is the only one
        scanned, it heads the order and may take from any other; else only from those that are no
        warmer than itself.
        """
        victim = self._first(scanned, holders)
        if victim is None or len(scanned) == 1 or is_leftover(victim):
            return victim
        coldness = self._policy.coldness
        is_colder = coldness(victim, self._now) >= coldness(claimant, self._now)
        return victim if is_colder else None

    def pass_over(self, victim: Request) -> None:
        """Name another than the last one in its place."""
        is_left = self._leftovers and self._leftovers[-1] is victim
        ranked = self._leftovers if is_left else self._ranked
        assert ranked.pop() is victim

    def reconsider(self) -> None:
        """Rank anew those who could not give way, or were passed over."""
        self._is_fresh = False

    def _first(self, excluded: Collection[int], holders: Iterable[Request]) -> Request | None:
        """Return the coldest leftover, else the coldest holder; the youngest among equals."""
        while True:
            while self._leftovers:
                request = self._leftovers[-1]
                if is_leftover(request) and self._may_lose(request, excluded):
                    return request
                self._leftovers.pop()
            while self._ranked:
                request = self._ranked[-1]
                if self._may_lose(request, excluded):
                    return request
                self._ranked.pop()
            if self._is_fresh:
                return None
            self._rank(excluded, holders)

    def _rank(self, excluded: Collection[int], holders: Iterable[Request]) -> None:
        ranked = sorted(
            (request for request in holders if self._may_lose(request, excluded)),
            key=by_coldness(self._policy.coldness, self._now),
        )
        self._leftovers = [request for request in ranked if is_leftover(request)]
        self._ranked = [request for request in ranked if not is_leftover(request)]
        self._is_fresh = True
        self._num_plans_left = len(ranked) // NUM_RANKED_PER_PLAN

    @staticmethod
    def _may_lose(request: Request, excluded: Collection[int]) -> bool:
        # One that recomputes is exempt: it would lose the same KV again and again.
        table = request.table
        return not (
            table is None
            or table.is_drained
            or table.is_draining
            or request.is_recomputing
            or request.handle in excluded
        )


def is_leftover(request: Request) -> bool:
    """Whether it gave way and has not been brought back, so that no step uses what it has."""
    return request.table is not None and not request.table.is_wanted
