"""The parts of policies against naive ones: a list that is sorted, a dict that is searched."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.policies.parts import MAX_STALE, Deadlines, SortedRequests
from tests.core.builders import make_request

HANDLES = st.integers(0, 9)
TIMES = st.integers(0, 6)


def turned(item: tuple[int, float]) -> tuple[float, int]:
    """Return a deadline before its handle."""
    return item[1], item[0]


@given(st.lists(st.tuples(st.sampled_from(("put", "discard", "pop")), HANDLES, TIMES)))
def test_deadlines_are_a_dict_that_is_searched(events: list[tuple[str, int, int]]) -> None:
    """The first is the least (due, handle) of those set last, whatever was set before."""
    deadlines, naive = Deadlines(), dict[int, float]()
    for kind, handle, due in events:
        if kind == "put":
            deadlines.put(handle, due)
            naive[handle] = due
        elif kind == "discard":
            assert deadlines.discard(handle) == naive.pop(handle, None)
        elif naive:
            entry = deadlines.pop(due)
            assert entry == min(
                (item for item in map(turned, naive.items()) if item[0] <= due), default=None
            )
            if entry is not None:
                del naive[entry[1]]
        least = min(map(turned, naive.items()), default=(math.inf, -1))
        assert deadlines.first() == least
        assert len(deadlines) == len(naive)


def test_deadlines_that_are_put_off_for_ever_take_no_room() -> None:
    """The heap has at most two entries for each deadline, and a few more."""
    deadlines = Deadlines()
    for turn in range(10_000):
        deadlines.put(turn % 3, float(turn))
    assert len(deadlines) == 3
    assert len(deadlines._heap) <= MAX_STALE + 6
    assert deadlines.first() == (9997.0, 1)


@given(st.lists(st.tuples(st.booleans(), HANDLES, TIMES)))
def test_sorted_requests_are_a_list_that_is_sorted(events: list[tuple[bool, int, int]]) -> None:
    """By key, then by arrival, after any number of moves."""
    requests, naive = SortedRequests[float](), dict[int, float]()
    for is_put, handle, key in events:
        request = make_request(handle)
        if is_put:
            requests.put(request, key)
            naive[handle] = key
            assert requests.key(request) == key
        elif handle in naive:
            assert requests.discard(request) == naive.pop(handle)
        in_order = sorted(naive, key=lambda handle: (naive[handle], handle))
        assert [request.handle for request in requests] == in_order
