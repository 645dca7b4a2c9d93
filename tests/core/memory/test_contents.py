"""Contents: one Block for a hash, the first."""

from __future__ import annotations

import pytest

from fastserve.core.memory.block import Block
from fastserve.core.memory.contents import Contents


def test_of_two_blocks_with_equal_content_the_first_is_found() -> None:
    """When it is forgotten, another may be published; a Block keeps its first hash."""
    contents, first, twin = Contents(), Block(0), Block(1)
    contents.publish(first, b"x")
    contents.publish(twin, b"x")
    assert contents.find(b"x") is first
    assert (first.hash, twin.hash) == (b"x", None)
    contents.publish(first, b"y")
    assert contents.find(b"y") is None
    contents.forget(first)
    contents.forget(first)
    assert (contents.find(b"x"), first.hash) == (None, None)
    contents.publish(twin, b"x")
    assert contents.find(b"x") is twin


def test_check_sees_what_is_found_and_is_nowhere() -> None:
    """The check is not a formality."""
    contents, block = Contents(), Block(0)
    contents.publish(block, b"x")
    contents.check({block})
    with pytest.raises(AssertionError):
        contents.check(())
    block.hash = b"y"
    with pytest.raises(AssertionError):
        contents.check({block})
