"""CpuKernels: the fused operations of a step on a CPU, and the work lists of its attention.

Rules: tensors are of the kernels' dtype, rows contiguous; statistics and sums are taken in float32.
What is computed for a row or a token depends on nothing but that row, or that token's query and the
keys and values before it: the same bits in any batch, chunking or number of threads. An instance
serves one thread. Must not know: networks, requests, who owns the KV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastserve.model.attention.interfaces import LayerKV
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.input_batch import IntArray, Rows

CHUNK_TOKENS = 16
"""Query tokens of one sequence that share what is read of its keys and values."""


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """The pieces that a step's attention falls into, longest first.

    A piece is a run of consecutive tokens of one sequence: its first token, how many, its row of
    the tables, the position of its first token.
    """

    pieces: IntArray  # [num_pieces, 4]
    tables: IntArray  # [num_rows, blocks] block ids; entries past a token's position are not read
    positions: int  # read in all, which tells whether threads pay


class CpuKernels(Protocol):
    """The kernels for one dtype."""

    name: str
    dtype: torch.dtype

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x / rms(x) · weight of the rows of `x` [num_rows, width]."""

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Return (x - mean) / std · weight + bias of the rows of `x` [num_rows, width]."""

    def head_rms_norm_(self, qkv: Tensor, weight: Tensor, eps: float) -> None:
        """Normalize heads in place: `weight` [normed_heads, head_dim] is that of the first ones.

        qkv: [num_tokens, all_heads, head_dim].
        """

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) · up: [num_rows, 2 * width] becomes [num_rows, width]."""

    def rotate_and_write(
        self,
        qkv: Tensor,  # [num_tokens, heads + 2 * kv_heads, head_dim]
        rotations: Tensor | None,  # [num_tokens, 1, head_dim / 2] complex64
        layer: LayerKV,
        write_blocks: Tensor,  # [num_tokens] int64
        write_offsets: Tensor,  # [num_tokens] int64
        num_heads: int,
    ) -> None:
        """Rotate queries and keys in place, and store keys and values in their slots."""

    def attend(
        self,
        qkv: Tensor,  # [num_tokens, heads + 2 * kv_heads, head_dim]; only queries are read
        layer: LayerKV,
        work: AttentionWork,
        out: Tensor,  # [num_tokens, heads * head_dim]; rows that no piece names are left alone
        shape: AttentionShape,
    ) -> None:
        """Write softmax(scale · q Kᵀ) V of each token over the positions up to its own."""


def attention_work(rows: Rows) -> AttentionWork:
    """Cut the rows of a step into pieces."""
    counts, starts = rows.counts, rows.starts
    first_tokens = np.cumsum(counts) - counts
    if rows.num_single == len(counts):
        row_ids, inner = np.arange(len(counts)), np.zeros_like(counts)
    else:
        parts = (counts + CHUNK_TOKENS - 1) // CHUNK_TOKENS
        row_ids = np.repeat(np.arange(len(counts)), parts)
        first_parts = np.cumsum(parts) - parts
        inner = (np.arange(len(row_ids)) - first_parts[row_ids]) * CHUNK_TOKENS
    tokens = np.minimum(counts[row_ids] - inner, CHUNK_TOKENS)
    positions = starts[row_ids] + inner
    pieces = np.stack((first_tokens[row_ids] + inner, tokens, row_ids, positions), axis=1)
    costs = (positions + tokens) * tokens
    order = np.argsort(-costs, kind="stable")
    tables = np.ascontiguousarray(rows.tables)
    return AttentionWork(np.ascontiguousarray(pieces[order]), tables, int(costs.sum()))
