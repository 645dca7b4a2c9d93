"""Networks of random weights, their KV, batches and graphs, for checks and measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastserve.checkpoint.model_config import ModelConfig, parse_model_config
from fastserve.executor.cuda_graphs import Capture, CudaCapture, DecodeGraphs
from fastserve.model.attention.interfaces import PagedKV
from fastserve.model.families.architectures import Network, load_network
from fastserve.model.input_batch import InputBatch, build_input_batch
from fastserve.model.loader import DummyWeights, Part, Weights, part_index
from fastserve.model.ops.interfaces import Ops

__all__ = ["Capture", "build_network", "decode_batch", "make_graphs", "make_kv"]

BLOCK_SIZE = 16


class DeviceWeights:
    """Fits `Weights`: random numbers drawn where they are needed, which a CPU takes minutes for."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self._device = device
        self.num_elements = 0

    def has(self, name: str) -> bool:
        """Fit `Weights`."""
        return True

    def get(self, name: str, *shape: int, part: Part = ()) -> Tensor:
        """Fit `Weights`, but for a part, whose numbers are not those of the whole tensor."""
        if index := part_index(part, shape):
            shape = torch.empty(shape, device="meta")[index].shape
        tensor = torch.empty(shape, dtype=self.dtype, device=self._device)
        self.num_elements += tensor.numel()
        return tensor.normal_(0.0, 0.02)

    def finish(self, elsewhere: Sequence[str] = ()) -> None:
        """Fit `Weights`."""


def build_network(
    values: dict[str, Any],
    ops: Ops,
    dtype: torch.dtype,
    device: torch.device,
    *,
    on_cpu: bool = False,
    max_len: int | None = None,
) -> tuple[Network, ModelConfig]:
    """Build the network of a config.json's fields; `on_cpu`: the same numbers on every device."""
    config = parse_model_config(values, source="shape")
    weights: Weights = DummyWeights(dtype, device) if on_cpu else DeviceWeights(dtype, device)
    length = max_len or config.max_model_len
    return load_network(config, weights, ops, max_len=length, device=device), config


def make_kv(
    config: ModelConfig, num_blocks: int, dtype: torch.dtype, device: torch.device
) -> PagedKV:
    """Make zeroed KV."""
    shape = (num_blocks, config.num_layers, 2, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    return PagedKV(torch.zeros(shape, dtype=dtype, device=device))


def make_graphs(
    network: Network,
    kv: PagedKV,
    config: ModelConfig,
    *,
    batch_sizes: Sequence[int],
    max_len: int,
    capture: Capture | None,
) -> DecodeGraphs:
    """Capture decodes; without `capture`, by CUDA."""
    return DecodeGraphs(
        network,
        kv,
        batch_sizes=batch_sizes,
        max_model_len=max_len,
        vocab_size=config.vocab_size,
        prepare=lambda token_ids: None,
        capture=capture or CudaCapture(),
        on_progress=lambda stage, fraction: None,
    )


def decode_batch(size: int, context: int, *, num_blocks: int, block_size: int) -> InputBatch:
    """Build one decode of `size` rows at the end of contexts of one length."""
    used = -(-context // block_size)
    blocks = np.random.default_rng(0).permutation(num_blocks)[: size * used]
    return build_input_batch(
        token_ids=np.arange(size),
        starts=np.full(size, context - 1),
        counts=np.ones(size, np.int64),
        tables=blocks.reshape(size, used),
        scored=None,
        block_size=block_size,
        device=torch.device("cpu"),
    )


def prefill_batch(size: int, length: int, *, num_blocks: int, block_size: int) -> InputBatch:
    """Build one prefill of `size` whole prompts; each gets logits for its last token."""
    used = -(-length // block_size)
    blocks = np.random.default_rng(0).permutation(num_blocks)[: size * used]
    return build_input_batch(
        token_ids=np.arange(size * length) % 1000,
        starts=np.zeros(size, np.int64),
        counts=np.full(size, length),
        tables=blocks.reshape(size, used),
        scored=np.arange(1, size + 1) * length - 1,
        block_size=block_size,
        device=torch.device("cpu"),
    )
