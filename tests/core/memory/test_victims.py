"""Victims: who is named among those that are equally cold, and who never is."""

from __future__ import annotations

from fastserve.core.memory.table import BlockTable
from fastserve.core.memory.victims import VictimRanking
from fastserve.core.policies.fcfs import FCFS
from fastserve.core.policies.protocol import Coldness
from fastserve.core.request import Request
from tests.core.builders import make_request

CLAIMANT = make_request(9)


class Alike(FCFS):
    """All requests are equally cold."""

    def coldness(self, request: Request, now: float) -> Coldness:
        """Return the same for all."""
        return (0.0,)


def holder(handle: int) -> Request:
    """Return a request that holds KV."""
    request = make_request(handle)
    request.table = BlockTable([])
    return request


def test_of_the_equally_cold_the_youngest_is_named_first() -> None:
    """Who came first has waited longest: it is the last to lose its KV."""
    holders = [holder(handle) for handle in (1, 0, 2)]
    ranking = VictimRanking(Alike())
    ranking.begin_plan(0.0)
    named = []
    for _ in holders:
        victim = ranking.find(CLAIMANT, {CLAIMANT.handle}, holders)
        assert victim is not None
        named.append(victim.handle)
        victim.table = None
    assert named == [2, 1, 0]
    assert ranking.find(CLAIMANT, {CLAIMANT.handle}, holders) is None


def test_who_was_scanned_or_computes_again_is_not_named() -> None:
    """The plan has counted on the one; the other would lose the same KV again and again."""
    scanned, again, free = holder(3), holder(2), holder(1)
    again.epoch = 1
    ranking = VictimRanking(Alike())
    ranking.begin_plan(0.0)
    victim = ranking.find(CLAIMANT, {CLAIMANT.handle, scanned.handle}, [scanned, again, free])
    assert victim is free
