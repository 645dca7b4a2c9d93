"""KVStore: the owner of the KV tensors of both tiers, and how many blocks there are of each.

Rules: block-major in both tiers, so that a block is one piece. The device's is one tensor. The
host's lies in chunks of at most 1 GiB: pinned memory comes in powers of two, and a large piece of
it is slow to get or not to be had. Memory of a CPU is mapped as it is first touched, so that a
large pool costs nothing until it is used; pinned memory is all there before the first request.
Must not know: which request owns a block, when blocks move.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastserve.executor.facts import BlockCounts
from fastserve.host.machine import available_memory
from fastserve.model.attention.interfaces import PagedKV
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError

logger = logging.getLogger(__name__)

CPU_SHARE = 0.25
CPU_LIMIT = 4 * 2**30
HOST_SHARE = 0.5
"""Of the memory that is available, what the host tier may take."""
CHUNK_BYTES = 2**30


class KVShape(NamedTuple):
    """What a rank keeps of a token: the KV of its layers and of its heads."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def block_bytes(self, block_size: int, dtype: torch.dtype) -> int:
        """Return the bytes of one block."""
        per_token = self.num_layers * 2 * self.num_kv_heads * self.head_dim
        return per_token * block_size * dtype.itemsize


class HostTier:
    """Blocks in host memory: block i is row i % `rows` of chunk i // `rows`."""

    def __init__(
        self,
        num_blocks: int,
        block_shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        is_pinned: bool,
    ) -> None:
        self.num_blocks = num_blocks
        self.rows = max(CHUNK_BYTES // (int(np.prod(block_shape)) * dtype.itemsize), 1)
        counts = [min(self.rows, num_blocks - first) for first in range(0, num_blocks, self.rows)]
        shapes = [(count, *block_shape) for count in counts]
        pinned = _pinned(shapes, dtype) if is_pinned else []
        # What could not be pinned is as good a place, only slower to reach.
        pageable = [_lazy_zeros(shape, dtype) for shape in shapes[len(pinned) :]]
        self.chunks: tuple[Tensor, ...] = (*pinned, *pageable)

    def __getitem__(self, block_id: int) -> Tensor:
        """Return one block; IndexError where there is none of this id."""
        return self.chunks[block_id // self.rows][block_id % self.rows]


class KVStore:
    """KV of one rank."""

    def __init__(
        self,
        kv_shape: KVShape,
        blocks: BlockCounts,
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        num_layers, num_kv_heads, head_dim = kv_shape
        block_shape = (num_layers, 2, block_size, num_kv_heads, head_dim)
        shape = (blocks.device, *block_shape)
        is_cpu = device.type == "cpu"
        self.device = PagedKV(
            _lazy_zeros(shape, dtype) if is_cpu else torch.zeros(shape, dtype=dtype, device=device)
        )
        self.host = HostTier(blocks.host, block_shape, dtype, is_pinned=not is_cpu)
        self.block_bytes = kv_shape.block_bytes(block_size, dtype)

    def touch(self, num_blocks: int) -> None:
        """Make the first blocks real memory: unmapped zero pages are faster than any KV."""
        self.device.tensor[:num_blocks].zero_()


def room_for_blocks(
    config: EngineConfig, block_bytes: int, device: torch.device, *, num_local_ranks: int = 1
) -> BlockCounts:
    """Return for how many blocks there is room in each tier: as told, else as memory allows.

    Of the host's memory, a rank takes no more than its share. Raises ConfigError when not even one
    block fits on the device.
    """
    available = available_memory() // (num_local_ranks * config.data_parallel_size)
    host = _room_on_host(config, block_bytes, available)
    if config.num_device_blocks is not None:
        return BlockCounts(config.num_device_blocks, host)
    if config.kv_cache_memory_bytes is not None:
        budget, source = config.kv_cache_memory_bytes, "--kv-cache-memory-bytes"
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = int(total * config.gpu_memory_utilization) - (total - free)
        source = "--gpu-memory-utilization"
    else:
        budget, source = min(int(available * CPU_SHARE), CPU_LIMIT), "free memory"
    num_blocks = budget // block_bytes
    if num_blocks < 1:
        raise ConfigError(f"{source}: {budget} bytes hold no KV block of {block_bytes} bytes")
    return BlockCounts(num_blocks, host)


def _room_on_host(config: EngineConfig, block_bytes: int, available: int) -> int:
    return min(config.host_kv_bytes, int(available * HOST_SHARE)) // block_bytes


def _pinned(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Return pinned tensors of these shapes, as many of them as can be had."""
    tensors: list[Tensor] = []
    for shape in shapes:
        try:
            tensors.append(torch.zeros(shape, dtype=dtype, pin_memory=True))
        except RuntimeError as error:
            logger.warning(
                "%d of %d chunks of KV in host memory are not pinned, and slower to copy: %s",
                len(shapes) - len(tensors),
                len(shapes),
                str(error).partition("\n")[0],
            )
            break
    return tensors


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # numpy asks the kernel for zero pages; torch would write every one of them now.
    storage = np.zeros(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(storage).view(dtype).view(shape)
