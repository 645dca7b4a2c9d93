"""Poison: which blocks are NaN, against what a scheduler of its own says of them."""

from __future__ import annotations

import random

import pytest
import torch

from fastserve.core.messages import Copy, CopyDirection, Work
from fastserve.core.request import Handle
from fastserve.executor.facts import BlockCounts
from fastserve.executor.kv_store import KVShape, KVStore
from fastserve.executor.poison import Poison

BLOCK_SIZE = 4
NUM_BLOCKS = 12
NUM_HOST_BLOCKS = 5


def make_store() -> KVStore:
    """Return KV of two tiers."""
    return KVStore(
        KVShape(1, 1, 3),
        BlockCounts(NUM_BLOCKS, NUM_HOST_BLOCKS),
        block_size=BLOCK_SIZE,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def work(handle: int, start: int, table_from: int, block_ids: list[int]) -> Work:
    """Return a share that brings blocks into a table."""
    return Work(
        Handle(handle), 0, start, 1, (1,), table_from, block_ids, sample=False, logits="last"
    )


def nans(tensor: torch.Tensor) -> set[int]:
    """Return the blocks of which every number is NaN."""
    return {block for block in range(len(tensor)) if bool(tensor[block].isnan().all())}


def test_a_block_taken_from_a_request_is_no_longer_its_own() -> None:
    """It still names the block; when it is forgotten, the other's KV stays."""
    kv = make_store()
    tensor, poison = kv.device.tensor, Poison(kv, BLOCK_SIZE, spares_full_blocks=False)
    poison.enter(work(0, 0, 0, [3, 4]))
    poison.enter(work(1, 0, 0, [4]))
    tensor[4] = 2.0
    poison.leave(Handle(0), [3, 4], 8)
    assert 3 in nans(tensor)
    assert (tensor[4] == 2.0).all()
    poison.leave(Handle(1), [4], 1)
    assert nans(tensor) == set(range(NUM_BLOCKS))


@pytest.mark.parametrize("has_prefix_cache", [False, True])
def test_free_blocks_are_poisoned_and_others_keep_their_kv(has_prefix_cache: bool) -> None:
    """Requests come, grow, share beginnings and end, at random."""
    rng = random.Random(has_prefix_cache)
    kv = make_store()
    tensor, poison = kv.device.tensor, Poison(kv, BLOCK_SIZE, spares_full_blocks=has_prefix_cache)
    free = list(range(NUM_BLOCKS))
    cached: set[int] = set()  # those of them that a request may find as its beginning
    tables: dict[int, list[int]] = {}
    lengths: dict[int, int] = {}
    for handle in range(400):
        sharing = rng.choice([None, *tables]) if has_prefix_cache else None
        shared = [] if sharing is None else tables[sharing][: lengths[sharing] // BLOCK_SIZE]
        if len(free) > 1:
            blocks = [*shared, free.pop(rng.randrange(len(free)))]
            cached.discard(blocks[-1])
            start = len(shared) * BLOCK_SIZE
            poison.enter(work(handle, start, 0, blocks))
            assert not tensor[blocks[-1]].any(), "unwritten slots must be numbers"
            lengths[handle] = start + rng.randrange(1, BLOCK_SIZE + 1)
            tables[handle] = blocks
            tensor[blocks[-1], :, :, : lengths[handle] - start] = 1.0
        while tables and (len(free) < 2 or rng.random() < 0.4):
            handle = rng.choice(list(tables))
            blocks = tables.pop(handle)
            poison.leave(Handle(handle), blocks, lengths[handle])
            used = {block for table in tables.values() for block in table}
            full = set(blocks[: lengths[handle] // BLOCK_SIZE]) if has_prefix_cache else set()
            free += [block for block in blocks if block not in used]
            cached = (cached | full) - used
            assert nans(tensor).issuperset(set(free) - cached)
            assert nans(tensor).isdisjoint(used | cached)
    assert len(lengths) > 100


def test_places_on_the_host_are_poisoned_before_use_and_as_told() -> None:
    """A copy in from where none went out brings NaN, and so does one from a place given back."""
    kv = make_store()
    poison = Poison(kv, BLOCK_SIZE, spares_full_blocks=False)
    (host,) = kv.host.chunks
    poison.move(Copy(0, CopyDirection.SWAP_OUT, (0,), (3,)))
    poison.move(Copy(1, CopyDirection.SWAP_IN, (2, 3), (0, 1)))
    assert nans(host) == {2}, "of what was copied from, what nothing was copied to"
    host[:] = kv.device.tensor[:] = 2.0
    poison.spoil([7, 2], [4, 1])
    assert nans(host) == {1, 4}
    assert nans(kv.device.tensor) == {2, 7}


def test_what_a_copy_fills_belongs_to_nobody_until_it_enters_a_table() -> None:
    """Who had the place before is forgotten behind the copy, and must not spoil what it brought."""
    kv = make_store()
    poison = Poison(kv, BLOCK_SIZE, spares_full_blocks=False)
    poison.enter(work(0, 0, 0, [3, 4]))
    poison.move(Copy(0, CopyDirection.SWAP_OUT, (4,), (0,)))
    poison.move(Copy(1, CopyDirection.SWAP_IN, (1,), (3,)))
    kv.device.tensor[3] = 2.0
    poison.leave(Handle(0), [3, 4], 8)
    assert (kv.device.tensor[3] == 2.0).all()
    assert 4 in nans(kv.device.tensor), "a block that is copied out keeps its owner"
    poison.enter(work(1, BLOCK_SIZE, 0, [3, 5]))
    poison.leave(Handle(1), [3, 5], 5)
    assert 3 in nans(kv.device.tensor)
