"""How many KV blocks there are, and what the pool's memory costs."""

from __future__ import annotations

import pytest
import torch

from fastserve.executor import kv_store
from fastserve.executor.facts import BlockCounts
from fastserve.executor.kv_store import HostTier, KVShape, KVStore, room_for_blocks
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError

CPU = torch.device("cpu")
SHAPE = KVShape(num_layers=3, num_kv_heads=2, head_dim=8)


def room(block_bytes=1000, **settings) -> int:
    """Count the blocks that fit on the CPU, as its device."""
    return room_for_blocks(EngineConfig(block_size=10, **settings), block_bytes, CPU).device


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
    return KVStore(
        SHAPE, BlockCounts(num_blocks, num_blocks), block_size=16, dtype=torch.float32, device=CPU
    )


def resident_bytes() -> int:
    """Return the memory of this process that is really there."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def test_a_large_pool_costs_nothing_until_used():
    """Both tiers are mapped as they are touched."""
    before = resident_bytes()
    store = make_store(100_000)  # 614 MB in each tier
    assert store.device.tensor.nbytes > 600_000_000
    assert sum(chunk.nbytes for chunk in store.host.chunks) == store.device.tensor.nbytes
    assert resident_bytes() - before < 50_000_000
    assert not store.device.tensor[::9999].any()
    store.touch(10_000)
    assert resident_bytes() - before > 50_000_000


def host_room(block_bytes=1000, **settings) -> int:
    """Count the blocks that host memory is taken for."""
    config = EngineConfig(num_device_blocks=1, **settings)
    return room_for_blocks(config, block_bytes, CPU).host


@pytest.mark.parametrize("mode", ["proactive", "proactive-by-level", "reactive"])
def test_host_blocks_as_told(mode, monkeypatch):
    """So many GiB, a part of one too, in whole blocks."""
    monkeypatch.setattr(kv_store, "available_memory", lambda: 2**40)
    assert host_room(2**20, preemption_mode=mode, swap_space=4) == 4096
    assert host_room(2**20, preemption_mode=mode, swap_space=0.0015) == 1
    assert host_room(2**20, preemption_mode=mode, swap_space=0.0009) == 0
    assert host_room(2**20, preemption_mode=mode, swap_space=0) == 0


@pytest.mark.parametrize("mode", ["recompute", "defer"])
def test_no_host_memory_where_nothing_is_swapped(mode):
    """Modes that never copy take none, whatever --swap-space is by default."""
    assert host_room(preemption_mode=mode, swap_space=4) == 0


def test_host_memory_leaves_half_of_what_there_is(monkeypatch):
    """More than that is not taken."""
    monkeypatch.setattr(kv_store, "available_memory", lambda: 2**30)
    assert host_room(2**20, preemption_mode="reactive", swap_space=4) == 512


@pytest.mark.parametrize("num_blocks", [0, 1, 4, 5, 8, 11])
def test_every_host_block_has_a_place_of_its_own(num_blocks, monkeypatch):
    """However many chunks there are; a chunk is no larger than told, the last has the rest."""
    monkeypatch.setattr(kv_store, "CHUNK_BYTES", 4 * 24 + 23)
    tier = HostTier(num_blocks, (2, 3), torch.float32, is_pinned=False)
    assert [len(chunk) for chunk in tier.chunks] == [4] * (num_blocks // 4) + [
        rest for rest in (num_blocks % 4,) if rest
    ]
    for block_id in range(num_blocks):
        tier[block_id].fill_(block_id + 1)
    found = [float(row.mean()) for chunk in tier.chunks for row in chunk]
    assert found == [block_id + 1 for block_id in range(num_blocks)]
    with pytest.raises(IndexError):
        tier[num_blocks]


def test_a_block_larger_than_a_chunk_is_a_chunk(monkeypatch):
    """It cannot be cut."""
    monkeypatch.setattr(kv_store, "CHUNK_BYTES", 8)
    tier = HostTier(3, (10,), torch.float32, is_pinned=False)
    assert [chunk.shape for chunk in tier.chunks] == [(1, 10)] * 3


@pytest.mark.parametrize("num_pinned", [0, 1, 2])
def test_what_cannot_be_pinned_is_pageable(num_pinned, monkeypatch, caplog):
    """All blocks are there, and one line says that they are slower."""
    zeros, calls = torch.zeros, []

    def pin(shape, *, dtype, pin_memory):
        calls.append(shape)
        if len(calls) > num_pinned:
            raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")
        return zeros(shape, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", pin)
    monkeypatch.setattr(kv_store, "CHUNK_BYTES", 32)
    tier = HostTier(5, (4,), torch.float32, is_pinned=True)
    assert [len(chunk) for chunk in tier.chunks] == [2, 2, 1]
    assert caplog.messages == [
        f"{3 - num_pinned} of 3 chunks of KV in host memory are not pinned, and slower to copy: "
        "CUDA error: out of memory"
    ]


@pytest.mark.gpu
def test_host_memory_beside_a_cuda_device_is_pinned():
    """Copies to it run beside steps only then."""
    device = torch.device("cuda", 0)
    store = KVStore(SHAPE, BlockCounts(3, 5), block_size=16, dtype=torch.bfloat16, device=device)
    assert store.device.tensor.is_cuda
    assert [chunk.is_pinned() for chunk in store.host.chunks] == [True]
