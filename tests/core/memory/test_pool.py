"""BlockPool against a model made of sets and lists."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fastserve.core.memory.block import Block
from fastserve.core.memory.pool import BlockPool

OPERATIONS = st.lists(st.tuples(st.sampled_from("trrrpn"), st.integers(0, 7)), max_size=60)


@given(num_places=st.integers(1, 6), operations=OPERATIONS)
@settings(max_examples=300)
def test_pool_behaves_like_sets(num_places: int, operations: list[tuple[str, int]]) -> None:
    """Places are a partition, contents are found while they last, the oldest cached goes first."""
    pool = BlockPool(num_places)
    names: list[Block] = []  # one entry per name; a block may have several
    cached: list[Block] = []  # least recently used first
    hashes: dict[bytes, Block] = {}
    for name, number in operations:
        block_hash = bytes([number])
        if name == "t" and pool.num_available:
            had_free = pool.num_free > 0
            block = pool.take()
            assert block.hash is None
            assert block.refs == 1
            assert block.device_id not in {other.device_id for other in names}
            if not had_free:
                evicted = cached.pop(0)
                assert block.device_id == evicted.device_id
                del hashes[evicted.hash or b""]
            names.append(block)
        elif name == "r" and names:
            block = names.pop(number % len(names))
            pool.release(block)
            if block not in names and block.hash is not None:
                cached.append(block)
        elif name == "p" and names:
            block = names[number % len(names)]
            pool.publish(block, block_hash)
            if block.hash == block_hash:
                assert hashes.setdefault(block_hash, block) is block
        elif name == "n" and block_hash in hashes:
            block = hashes[block_hash]
            pool.retain(block)
            names.append(block)
            if block in cached:
                cached.remove(block)
        assert all(pool.find(bytes([n])) is hashes.get(bytes([n])) for n in range(8))
        compare(pool, names, len(cached))


def compare(pool: BlockPool, names: list[Block], num_cached: int) -> None:
    """Hold the pool against the model's names and its number of cached blocks."""
    pool.check(set(names), ())
    assert all(block.refs == names.count(block) for block in names)
    used = {block.device_id for block in names}
    assert (pool.num_used, pool.num_cached) == (len(used), num_cached)
    assert pool.num_free == pool.num_device_blocks - len(used) - num_cached
    assert pool.num_available == pool.num_free + pool.num_cached


def test_a_twin_is_not_published() -> None:
    """Of two blocks with equal content one can be found; the other's place is free at once."""
    pool = BlockPool(2)
    first, twin = pool.take(), pool.take()
    pool.publish(first, b"x")
    pool.publish(twin, b"x")
    assert pool.find(b"x") is first
    pool.release(twin)
    assert (pool.num_free, pool.num_cached) == (1, 0)
    pool.release(first)
    assert (pool.num_free, pool.num_cached) == (1, 1)
    pool.check((), ())


def test_check_sees_a_leak_and_a_double_owner() -> None:
    """The check is not a formality."""
    pool = BlockPool(3)
    block = pool.take()
    pool.check({block}, ())
    with pytest.raises(AssertionError):
        pool.check((), ())
    pool._device.give_back(block.device_id)
    with pytest.raises(AssertionError):
        pool.check({block}, ())
