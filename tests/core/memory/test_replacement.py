"""Replacement: what gives up its place first, on either tier, and what is left of it."""

from __future__ import annotations

from collections.abc import Iterator

from fastserve.core.memory.block import Block, State
from fastserve.core.memory.pool import BlockPool
from tests.core.memory.blocks import saved, taken


def host_places(pool: BlockPool, others: list[Block]) -> Iterator[int]:
    """Yield the places that saves of other Blocks are given, one after the other."""
    for block in others:
        pool.save(block)
        yield block.host_id


def test_the_prefix_cache_gives_up_what_was_used_longest_ago() -> None:
    """Use counts, not age: a hit makes the oldest the last to go."""
    pool = BlockPool(3)
    hashes = [bytes([number]) for number in range(3)]
    blocks = [pool.take() for _ in hashes]
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.publish(block, block_hash)
        pool.release(block)
    pool.retain(blocks[0])
    pool.release(blocks[0])
    left: list[list[int]] = []
    for _ in blocks:
        pool.take()
        left.append([n for n, block_hash in enumerate(hashes) if pool.find(block_hash)])
    assert left == [[0, 2], [0], []]


def test_a_host_place_is_taken_from_what_is_missed_least() -> None:
    """Free ones, then the prefix cache from its oldest on, then those of what is in use."""
    pool = BlockPool(8, 4)
    old, young, used = saved(pool, b"o"), saved(pool, b"y"), saved(pool, b"u")
    pool.release(old)
    pool.release(young)
    places = [pool.host.num_blocks - 1, old.host_id, young.host_id, used.host_id]
    others = [taken(pool) for _ in range(4)]
    assert list(host_places(pool, others)) == places
    assert [block.state for block in (old, young, used)] == [State.DIRTY] * 3
    assert pool.find(b"u") is used, "what is on the device as well is not lost with the host's"
    assert not pool.num_host_available
    pool.check({used, *others}, others)


def test_the_last_saved_of_what_is_in_use_loses_its_host_place_first() -> None:
    """The coldest is saved first: it is the next whose place on the device is needed."""
    pool = BlockPool(8, 2)
    cold, warm = saved(pool, b"c"), saved(pool, b"w")
    assert list(host_places(pool, [taken(pool)])) == [1]
    assert (cold.state, warm.state) == (State.CLEAN, State.DIRTY)


def test_a_copy_ahead_of_need_takes_no_host_place_of_what_the_device_has() -> None:
    """It would make unsaved what it displaces."""
    pool = BlockPool(8, 1)
    assert pool.has_spare_host_place
    block = saved(pool, b"x")
    assert not pool.has_spare_host_place, "in use"
    pool.release(block)
    assert block.state is State.CLEAN
    assert not pool.has_spare_host_place, "of no use, but on the device as well"
    assert pool.num_host_available == 1
    pool.retain(block)
    pool.drop(block)
    pool.release(block)
    assert pool.has_spare_host_place, "only the host remembers it"


def test_what_the_prefix_cache_has_on_both_tiers_stays_findable_on_the_host() -> None:
    """Its place on the device is had for nothing, and its KV is not lost."""
    pool = BlockPool(1, 1)
    block = saved(pool, b"x")
    pool.release(block)
    taken(pool)
    assert pool.find(b"x") is block
    assert block.state is State.HOST


def test_where_kv_moves_for_nothing_what_is_displaced_is_on_the_host_at_once() -> None:
    """While there is room, and found there; then it is lost, as it is elsewhere."""
    pool = BlockPool(1, 1, saves_evicted=True)
    blocks = []
    for block_hash in (b"x", b"y"):
        block = pool.take()
        pool.publish(block, block_hash)
        pool.unwant(block)
        pool.release(block)
        blocks.append(block)
    assert [block.state for block in blocks] == [State.HOST, State.DIRTY]
    used = pool.take()
    assert pool.find(b"x") is blocks[0]
    assert pool.find(b"y") is None
    pool.check({used}, ())
