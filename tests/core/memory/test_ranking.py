"""Ranking: one order, whatever is done with it."""

from __future__ import annotations

from fastserve.core.memory.ranking import by_coldness
from tests.core.builders import make_request


def test_of_the_equally_cold_the_youngest_is_last() -> None:
    """What is not equal is ordered by coldness, as it is at the time."""
    requests = [make_request(handle) for handle in (2, 0, 3, 1)]
    for now, order in ((2.0, [0, 1, 2, 3]), (-2.0, [3, 0, 1, 2])):
        key = by_coldness(lambda request, now: (now * (request.handle // 3),), now)
        assert [request.handle for request in sorted(requests, key=key)] == order
