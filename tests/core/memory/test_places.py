"""Places: each is taken by one at a time, and a boundless tier costs nothing."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fastserve.core.memory.places import Places


@given(total=st.integers(0, 8), turns=st.lists(st.integers(-1, 7), max_size=60))
def test_no_place_is_taken_twice(total: int, turns: list[int]) -> None:
    """A place is taken or free; -1 takes, any other number gives one of the taken back."""
    places, taken = Places(total), list[int]()
    last: int | None = None  # given back, and not taken since
    for turn in turns:
        if turn < 0 and places.num_free:
            place = places.take()
            assert place not in taken
            assert 0 <= place < total
            assert last in (None, place), "not the last place that was given back"
            taken.append(place)
            last = None
        elif turn >= 0 and taken:
            last = taken.pop(turn % len(taken))
            places.give_back(last)
        assert places.num_free == total - len(taken)
        places.check(taken)


def test_more_places_than_there_is_memory_to_list() -> None:
    """Places that were never taken are not written down anywhere."""
    places = Places(2**62)
    assert [places.take() for _ in range(3)] == [0, 1, 2]
    places.give_back(1)
    assert places.num_free == 2**62 - 2
    assert [places.take(), places.take()] == [1, 3]
    places.check([0, 1, 2, 3])


@pytest.mark.parametrize("taken", [[], [0], [0, 0], [0, 1, 2]])
def test_check_sees_what_leaked_and_what_is_held_twice(taken: list[int]) -> None:
    """The check is not a formality."""
    places = Places(4)
    places.take()
    places.take()
    places.check([1, 0])
    with pytest.raises(AssertionError):
        places.check(taken)
    places.give_back(0)
    places.check([1])
    with pytest.raises(AssertionError):
        places.check([1, 0])


def test_no_place_is_handed_out_that_is_not_there() -> None:
    """Taking from a full tier is a fault of the caller, and seen."""
    places = Places(1)
    places.take()
    with pytest.raises(AssertionError, match="free"):
        places.take()
