"""How many KV blocks there are, and what the pool's memory costs."""

from __future__ import annotations

import pytest
import torch

from fastserve.executor import kv_store
from fastserve.executor.kv_store import KVShape, KVStore, room_for_blocks
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError

CPU = torch.device("cpu")
SHAPE = KVShape(num_layers=3, num_kv_heads=2, head_dim=8)


def room(block_bytes=1000, **settings) -> int:
    """Count the blocks that fit on the CPU."""
    return room_for_blocks(EngineConfig(block_size=10, **settings), block_bytes, CPU)


def test_block_bytes():
    """A block holds keys and values of every layer and head that the rank keeps."""
    assert SHAPE.block_bytes(16, torch.float32) == 3 * 2 * 16 * 2 * 8 * 4
    assert SHAPE.block_bytes(16, torch.bfloat16) == 3 * 2 * 16 * 2 * 8 * 2
    assert SHAPE._replace(num_layers=1, num_kv_heads=1).block_bytes(16, torch.float32) == 1024


def test_blocks_as_told():
    """A number of blocks wins over bytes, and bytes over what memory allows."""
    assert room(num_device_blocks=7, kv_cache_memory_bytes=10**6) == 7
    assert room(kv_cache_memory_bytes=123_456) == 123
    with pytest.raises(ConfigError, match="hold no KV block"):
        room(kv_cache_memory_bytes=999)


def test_blocks_by_memory(monkeypatch):
    """A quarter of free memory, at most 4 GiB."""
    monkeypatch.setattr(kv_store, "available_memory", lambda: 40_000_000)
    assert room(10_000) == 1000
    monkeypatch.setattr(kv_store, "available_memory", lambda: 2**50)
    assert room(2**21) == 2048
    monkeypatch.setattr(kv_store, "available_memory", lambda: 100)
    with pytest.raises(ConfigError, match="free memory"):
        room()


def make_store(num_blocks) -> KVStore:
    """Return a pool of the test's shape."""
    return KVStore(SHAPE, num_blocks=num_blocks, block_size=16, dtype=torch.float32, device=CPU)


def resident_bytes() -> int:
    """Return the memory of this process that is really there."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def test_a_large_pool_costs_nothing_until_used():
    """The pool is mapped as it is touched."""
    before = resident_bytes()
    store = make_store(100_000)  # 614 MB
    assert store.device.tensor.nbytes > 600_000_000
    assert resident_bytes() - before < 50_000_000
    assert not store.device.tensor[::9999].any()
    store.touch(10_000)
    assert resident_bytes() - before > 50_000_000
