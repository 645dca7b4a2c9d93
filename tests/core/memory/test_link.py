"""Link: every copy is planned once, reported once, and names the places of its blocks."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fastserve.core.memory.block import Block
from fastserve.core.memory.link import Link
from fastserve.core.messages import CopyDirection

OUT, IN = CopyDirection.SWAP_OUT, CopyDirection.SWAP_IN


def copy_s(num_blocks: int) -> float:
    """Return what a test can count in."""
    return 0.5 + 0.25 * num_blocks


def placed(number: int) -> Block:
    """Return a Block with a place of its own on each tier."""
    block = Block(number)
    block.host_id = 100 + number
    return block


@given(st.lists(st.tuples(st.sampled_from((OUT, IN, None)), st.integers(0, 5)), max_size=40))
def test_copies_are_planned_once_and_reported_in_any_order(turns) -> None:
    """None is both a plan that takes the copies so far, and the report of one of them."""
    link = Link(copy_s)
    begun: dict[int, tuple[CopyDirection, list[Block]]] = {}
    planned: set[int] = set()
    for number, (direction, size) in enumerate(turns):
        if direction is not None:
            blocks = [placed(10 * number + i) for i in range(size + 1)]
            link.begin(direction, blocks)
            begun[max([-1, *planned, *begun]) + 1] = (direction, blocks)
            continue
        for copy in link.take():
            assert copy.copy_id not in planned, "planned twice"
            planned.add(copy.copy_id)
            direction, blocks = begun[copy.copy_id]
            device = tuple(block.device_id for block in blocks)
            host = tuple(block.host_id for block in blocks)
            assert copy.direction is direction
            assert (copy.src, copy.dst) == ((device, host) if direction is OUT else (host, device))
        assert link.take() == ()
        if begun:
            copy_id = sorted(begun)[size % len(begun)]
            direction, blocks = begun.pop(copy_id)
            assert link.landed(copy_id) == (direction, blocks, copy_s(len(blocks)))
            with pytest.raises(ValueError, match=str(copy_id)):
                link.landed(copy_id)
        compare(link, begun)


def compare(link: Link, begun: dict[int, tuple[CopyDirection, list[Block]]]) -> None:
    """Hold the link against what was begun and not reported."""
    assert link.num_copies == len(begun)
    assert set(link.blocks()) == {block for _, blocks in begun.values() for block in blocks}
    for direction in (OUT, IN):
        sizes = [len(blocks) for way, blocks in begun.values() if way is direction]
        assert link.is_idle(direction) == (not sizes)
        assert link.backlog_s(direction) == pytest.approx(sum(map(copy_s, sizes)))


def test_an_idle_link_has_nothing_to_do_to_the_last_bit() -> None:
    """Sums of seconds leave no rest behind that would make it busy for ever."""
    link = Link(lambda num_blocks: 0.1 * num_blocks)
    for size in (1, 3, 7):
        link.begin(OUT, [placed(number) for number in range(size)])
    for copy in reversed(link.take()):
        link.landed(copy.copy_id)
    assert link.backlog_s(OUT) == 0.0


def test_a_copy_that_nobody_began_is_refused() -> None:
    """A report of an unknown copy is a fault of the executor, and seen."""
    with pytest.raises(ValueError, match="copy 7"):
        Link(copy_s).landed(7)
