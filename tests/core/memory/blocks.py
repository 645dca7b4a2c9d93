"""Blocks of a pool that are where a test wants them."""

from __future__ import annotations

from fastserve.core.memory.block import Block
from fastserve.core.memory.pool import BlockPool


def taken(pool: BlockPool, block_hash: bytes | None = None) -> Block:
    """Return a named Block that no table wants, findable if it has a hash."""
    block = pool.take()
    pool.unwant(block)
    if block_hash is not None:
        pool.publish(block, block_hash)
    return block


def saved(pool: BlockPool, block_hash: bytes) -> Block:
    """Return a named Block that is on both tiers."""
    block = taken(pool, block_hash)
    pool.save(block)
    pool.saved(block)
    return block
