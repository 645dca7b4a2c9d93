"""KVStore: the owner of the KV tensors, and how many blocks there are.

Rules: one tensor per tier, block-major. Memory is mapped as it is first touched, so that a large
pool costs nothing until it is used. Must not know: which request owns a block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from fastserve.host.machine import available_memory
from fastserve.model.attention.interfaces import PagedKV
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError

CPU_SHARE = 0.25
CPU_LIMIT = 4 * 2**30


class KVShape(NamedTuple):
    """What a rank keeps of a token: the KV of its layers and of its heads."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def block_bytes(self, block_size: int, dtype: torch.dtype) -> int:
        """Return the bytes of one block."""
        per_token = self.num_layers * 2 * self.num_kv_heads * self.head_dim
        return per_token * block_size * dtype.itemsize


class KVStore:
    """KV of one rank."""

    def __init__(
        self,
        kv_shape: KVShape,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        num_layers, num_kv_heads, head_dim = kv_shape
        shape = (num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim)
        self.device = PagedKV(_lazy_zeros(shape, dtype, device))

    def touch(self, num_blocks: int) -> None:
        """Make the first blocks real memory: unmapped zero pages are faster than any KV."""
        self.device.tensor[:num_blocks].zero_()


def room_for_blocks(config: EngineConfig, block_bytes: int, device: torch.device) -> int:
    """Return for how many blocks there is room: as told, else as memory allows.

    Raises ConfigError when not even one fits.
    """
    if config.num_device_blocks is not None:
        return config.num_device_blocks
    if config.kv_cache_memory_bytes is not None:
        budget, source = config.kv_cache_memory_bytes, "--kv-cache-memory-bytes"
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = int(total * config.gpu_memory_utilization) - (total - free)
        source = "--gpu-memory-utilization"
    else:
        budget, source = min(int(available_memory() * CPU_SHARE), CPU_LIMIT), "free memory"
    num_blocks = budget // block_bytes
    if num_blocks < 1:
        raise ConfigError(f"{source}: {budget} bytes hold no KV block of {block_bytes} bytes")
    return num_blocks


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the kernel for zero pages; torch would write every one of them now.
    storage = np.zeros(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(storage).view(dtype).view(shape)
