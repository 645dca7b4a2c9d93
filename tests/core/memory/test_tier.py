"""Tier: free + cached + moving + used = total, and the least recently used goes first."""

from __future__ import annotations

import pytest

from fastserve.core.memory.block import Block
from fastserve.core.memory.tier import Tier


def test_the_oldest_is_displaced_first() -> None:
    """What is needed meanwhile is not, and what was saved ahead of need is old at once."""
    tier = Tier(4)
    blocks = [Block(tier.take()) for _ in range(4)]
    assert (tier.num_free, tier.num_used, tier.oldest) == (0, 4, None)
    for block in blocks[:3]:
        tier.keep(block)
    tier.keep(blocks[3], is_old=True)
    tier.need(blocks[1])
    tier.need(blocks[1])
    assert (tier.num_cached, tier.num_available, tier.num_used) == (3, 3, 1)
    assert tier.oldest is blocks[3]
    assert [tier.displace() for _ in range(3)] == [blocks[3], blocks[0], blocks[2]]


def test_every_place_is_accounted_for_once() -> None:
    """What a copy holds is neither used nor to be had."""
    tier = Tier(4)
    first, second = Block(tier.take()), Block(tier.take())
    tier.keep(first)
    tier.num_moving += 1
    counts = (tier.num_free, tier.num_cached, tier.num_moving, tier.num_used)
    assert (counts, sum(counts)) == ((2, 1, 1, 0), tier.num_blocks)
    places = [first.device_id, second.device_id]
    tier.check_account(places, [first], 1)
    for wrong in ((places[:1], [first], 1), (places, [second], 1), (places, [first], 0)):
        with pytest.raises(AssertionError):
            tier.check_account(*wrong)
