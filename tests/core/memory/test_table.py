"""BlockTable: what a step could read."""

from __future__ import annotations

import pytest

from fastserve.core.memory.block import ON_DEVICE, Block, State
from fastserve.core.memory.table import BlockTable


def table_of(*states: State) -> BlockTable:
    """Return a table of Blocks in these states, each wanted by it alone."""
    blocks = [Block(number) for number in range(len(states))]
    for block, state in zip(blocks, states, strict=True):
        block.state, block.refs, block.wanted = state, 1, 1
    return BlockTable(blocks)


@pytest.mark.parametrize("state", State)
def test_one_block_that_is_not_there_keeps_a_table_from_running(state: State) -> None:
    """LEAVING counts as not there: its place is free as soon as its copy is done."""
    assert table_of(State.DIRTY, state, State.CLEAN).is_on_device == (state in ON_DEVICE)
    assert table_of(State.DIRTY, state).is_lost == (state is State.GONE)
    assert len(table_of(state, State.HOST).on_host()) == 1 + (state is State.HOST)


def test_an_empty_table_can_run_and_is_not_lost() -> None:
    """There is nothing to wait for."""
    table = table_of()
    assert table.is_on_device
    assert not table.is_lost
    assert table.on_host() == []
