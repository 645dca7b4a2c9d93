"""The simulated link: what two directions and a queue in each come to."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from fastserve.core.messages import Copy, CopyDirection
from fastserve.sim.link import Link
from tests.sim.machines import COSTS

COPYING = replace(COSTS, copy_base_s=0.1, copy_block_s=0.2)


def copy(copy_id, direction, num_blocks):
    """Return a copy of so many blocks."""
    places = tuple(range(num_blocks))
    return Copy(copy_id, direction, places, places)


def test_copies_of_one_direction_queue():
    """Each takes its base and its blocks, from when the one before it is done."""
    link = Link(COPYING)
    assert list(link.begin(copy(0, CopyDirection.SWAP_OUT, 3), 1.0)) == pytest.approx([1.0, 1.7])
    assert list(link.begin(copy(1, CopyDirection.SWAP_OUT, 1), 1.5)) == pytest.approx([1.7, 2.0])
    assert link.next_end == pytest.approx(1.7)
    assert link.ended(1.6) == []
    assert link.ended(2.5) == [0, 1]
    assert link.next_end == inf
    assert link.begin(copy(2, CopyDirection.SWAP_OUT, 1), 9.0)[0] == 9.0


def test_directions_do_not_slow_each_other_down():
    """A long copy out leaves a short copy in as short as it is."""
    link = Link(COPYING)
    link.begin(copy(0, CopyDirection.SWAP_OUT, 50), 0.0)
    assert list(link.begin(copy(1, CopyDirection.SWAP_IN, 2), 0.0)) == pytest.approx([0.0, 0.5])
    assert link.next_end == pytest.approx(0.5)
    assert link.ended(0.5) == [1]
    assert link.next_end == pytest.approx(10.1)


def test_a_link_of_zero_seconds_is_done_at_once():
    """Copies that cost nothing end when they begin."""
    link = Link(COSTS)
    assert link.begin(copy(0, CopyDirection.SWAP_IN, 9), 4.0) == (4.0, 4.0)
    assert link.ended(4.0) == [0]
