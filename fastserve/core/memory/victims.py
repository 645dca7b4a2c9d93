"""Who loses KV first when blocks run out: the largest estimated next schedule time.

Rules: ranking costs as many estimates as there are holders, so a ranking of n holders serves for
n / 64 plans, and the cost of a plan does not grow with the number of requests that hold KV. What
an old ranking says is checked against the present before it is acted on: only who is the very
coldest may be out of date. Must not know: why blocks are needed, or by whom.
"""

from __future__ import annotations

from collections.abc import Container

from fastserve.core.memory.memory import KVCacheManager
from fastserve.core.policies.protocol import Policy
from fastserve.core.request import Request

NUM_RANKED_PER_PLAN = 64


class VictimRanking:
    """Holders of KV, coldest last."""

    def __init__(self, cache: KVCacheManager, policy: Policy) -> None:
        self._cache = cache
        self._policy = policy
        self._ranked: list[tuple[float, int, Request]] = []
        self._num_plans_left = 0
        self._is_fresh = False

    def begin_plan(self) -> None:
        """Note that time has moved on since the last ranking."""
        self._is_fresh = False
        self._num_plans_left -= 1
        if self._num_plans_left < 0:
            self._ranked.clear()

    def coldest(self, now: float, excluded: Container[int]) -> Request | None:
        """Return the holder that loses its KV first, the youngest among equals.

        A request that recomputes is never named: it would lose the same KV again and again.
        """
        while True:
            while self._ranked:
                request = self._ranked[-1][2]
                if self._may_lose(request) and request.handle not in excluded:
                    return request
                self._ranked.pop()
            if self._is_fresh:
                return None
            self._rank(now, excluded)

    def _rank(self, now: float, excluded: Container[int]) -> None:
        estimate = self._policy.estimated_next_schedule_time
        self._ranked = sorted(
            (estimate(request, now), request.handle, request)
            for request in self._cache.holders()
            if self._may_lose(request) and request.handle not in excluded
        )
        self._is_fresh = True
        self._num_plans_left = len(self._ranked) // NUM_RANKED_PER_PLAN

    @staticmethod
    def _may_lose(request: Request) -> bool:
        return request.table is not None and not request.is_recomputing
