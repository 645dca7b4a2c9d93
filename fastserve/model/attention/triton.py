"""TritonAttention: paged attention in Triton kernels.

Rules: rotation and the write of KV are one kernel. Single tokens go through the decode kernel,
their contexts split where rows alone would leave the device idle, and a second kernel joins the
splits; chunks go in tiles. With `split_tokens` a context is always split at the same positions and
every token of a chunk goes as a single one, so that its values do not depend on the batch.
Half types keep their dtype in matrix products and float32 elsewhere.
Must not know: requests, weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastserve.model.attention.interfaces import LayerAttention, LayerKV
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.input_batch import InputBatch
from fastserve.model.kernels.triton.attention import chunk_kernel, decode_kernel, reduce_kernel
from fastserve.model.kernels.triton.rotary import rotate_and_write_kernel
from fastserve.model.staged_batch import CHUNK_TILE, DeviceRows, device_rows

MAX_SPLITS = 32
PROGRAMS_PER_PROCESSOR = 2
MIN_SPLIT_TOKENS = 128
"""A shorter share of a context is not worth a program of its own."""

MAX_HEAD_DIM = 256
"""Up to here a tile of keys and one of values fit the shared memory beside the queries."""

FIXED_SPLIT_TOKENS = 512
"""The split of a context that does not depend on the batch."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Sizes of the pieces that a program works on; they do not change what is computed."""

    decode_positions: int
    chunk_positions: int
    num_warps: int
    num_stages: int

    @classmethod
    def fitting(cls, head_dim: int, dtype: torch.dtype) -> Tiling:
        """Return sizes whose tiles fit the shared memory of a device of the Ampere class."""
        if dtype == torch.float32:  # exact products use no matrix units, and many registers
            return cls(16, 16, num_warps=8, num_stages=1)
        positions = 64 if head_dim <= 128 else 32
        return cls(positions, positions, num_warps=4, num_stages=2)


class TritonAttention:
    """Fits `Attention`."""

    def __init__(
        self,
        shape: AttentionShape,
        dtype: torch.dtype,
        *,
        split_tokens: int | None = None,
        tiling: Tiling | None = None,
    ) -> None:
        self.shape = shape
        self.split_tokens = split_tokens
        self.tiling = tiling or Tiling.fitting(shape.head_dim, dtype)
        self.block_dim = max(16, triton.next_power_of_2(shape.head_dim))
        self.block_group = max(16, triton.next_power_of_2(shape.group_size))
        # In powers of two: exp2 is one instruction.
        self.scale = shape.scale / math.log(2.0)

    @staticmethod
    def supports(shape: AttentionShape) -> bool:
        """Whether the kernels can compute this; where not, another attention must."""
        return shape.head_dim <= MAX_HEAD_DIM

    def plan(self, batch: InputBatch) -> LayerAttention:
        return TritonStep(self, batch)

    def num_splits(self, num_tokens: int, max_context: int, device: torch.device) -> int:
        """Return into how many shares the decode kernel divides each context."""
        if self.split_tokens is not None:
            return -(-max_context // self.split_tokens)
        wanted = (
            PROGRAMS_PER_PROCESSOR
            * num_processors(device)
            // (num_tokens * self.shape.num_kv_heads)
        )
        useful = -(-max_context // MIN_SPLIT_TOKENS)
        # A power of two: each number of splits is a kernel of its own.
        num_splits: int = triton.next_power_of_2(max(1, min(wanted, useful, MAX_SPLITS)))
        return num_splits


class TritonStep:
    """Fits `LayerAttention`: one step, in every layer."""

    def __init__(self, attention: TritonAttention, batch: InputBatch) -> None:
        self.attention = attention
        self.batch = batch
        self.rows: DeviceRows = device_rows(batch)
        self.num_tokens = len(batch.positions)
        is_fixed = attention.split_tokens is not None
        self.num_single = self.num_tokens if is_fixed else batch.rows.num_single
        self.num_tiles = 0 if is_fixed else len(self.rows.tile_tokens)
        device = batch.positions.device
        self.num_splits = 1
        if self.num_single:
            self.num_splits = attention.num_splits(self.num_single, self.rows.max_context, device)
        shape = (self.num_single, attention.shape.num_heads, self.num_splits)
        size = 0 if self.num_splits == 1 else math.prod(shape)
        self.log_totals = torch.empty(size, dtype=torch.float32, device=device)
        self.partial = torch.empty(
            size * attention.shape.head_dim, dtype=torch.float32, device=device
        )

    def __call__(self, qkv: Tensor, rotations: Tensor | None, layer: LayerKV) -> Tensor:
        attention = self.attention
        rotate_and_write(qkv, rotations, layer, self.batch, attention.shape.num_heads)
        width = attention.shape.width
        out = torch.empty(self.num_tokens, width, dtype=qkv.dtype, device=qkv.device)
        if self.num_single:
            self._decode(out, qkv, layer)
        if self.num_tiles:
            self._chunks(out, qkv, layer)
        return out

    def _decode(self, out: Tensor, qkv: Tensor, layer: LayerKV) -> None:
        attention, rows = self.attention, self.rows
        splits = {
            "BLOCK_DIM": attention.block_dim,
            "BLOCK_N": attention.tiling.decode_positions,
            "NUM_SPLITS": self.num_splits,
            "SPLIT_TOKENS": attention.split_tokens or 0,
        }
        decode_kernel[(self.num_single, attention.shape.num_kv_heads, self.num_splits)](
            out, self.partial, self.log_totals, qkv, layer.keys, layer.values,
            rows.tables, rows.table_width, rows.positions, rows.token_rows,
            layer.keys.stride(0), attention.scale,
            NUM_HEADS=attention.shape.num_heads,
            NUM_KV_HEADS=attention.shape.num_kv_heads,
            HEAD_DIM=attention.shape.head_dim,
            BLOCK_SIZE=block_size(attention, layer),
            BLOCK_GROUP=attention.block_group,
            DOT=dot_type(qkv),
            num_warps=attention.tiling.num_warps,
            num_stages=attention.tiling.num_stages,
            **splits,
        )  # fmt: skip
        if self.num_splits > 1:
            reduce_kernel[(self.num_single, attention.shape.num_heads)](
                out, self.partial, self.log_totals, rows.positions, rows.token_rows,
                NUM_HEADS=attention.shape.num_heads,
                HEAD_DIM=attention.shape.head_dim,
                num_warps=1,
                **splits,
            )  # fmt: skip

    def _chunks(self, out: Tensor, qkv: Tensor, layer: LayerKV) -> None:
        attention, rows = self.attention, self.rows
        chunk_kernel[(self.num_tiles, attention.shape.num_heads)](
            out, qkv, layer.keys, layer.values,
            rows.tables, rows.table_width, rows.positions, rows.token_rows,
            rows.tile_tokens, rows.tile_lengths,
            layer.keys.stride(0), attention.scale,
            NUM_HEADS=attention.shape.num_heads,
            NUM_KV_HEADS=attention.shape.num_kv_heads,
            HEAD_DIM=attention.shape.head_dim,
            BLOCK_SIZE=block_size(attention, layer),
            BLOCK_DIM=attention.block_dim,
            BLOCK_M=CHUNK_TILE,
            BLOCK_N=attention.tiling.chunk_positions,
            DOT=dot_type(qkv),
            num_warps=attention.tiling.num_warps,
            num_stages=attention.tiling.num_stages,
        )  # fmt: skip


def rotate_and_write(
    qkv: Tensor, rotations: Tensor | None, layer: LayerKV, batch: InputBatch, num_heads: int
) -> None:
    """Rotate queries in place, and store rotated keys and values in their slots."""
    num_tokens, total_heads, head_dim = qkv.shape
    if not qkv.is_contiguous():
        raise ValueError("queries, keys and values must be one contiguous tensor")
    block_pairs = triton.next_power_of_2(-(-head_dim // 2))
    block_heads = max(1, 512 // block_pairs)
    # A placeholder where there are no rotations: the kernel does not look at it.
    angles = qkv if rotations is None else torch.view_as_real(rotations)
    rotate_and_write_kernel[(num_tokens, triton.cdiv(total_heads, block_heads))](
        qkv, angles, layer.keys, layer.values, batch.write_blocks, batch.write_offsets,
        layer.keys.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=(total_heads - num_heads) // 2,
        HEAD_DIM=head_dim,
        HAS_ROTATIONS=rotations is not None,
        BLOCK_HEADS=block_heads,
        BLOCK_PAIRS=block_pairs,
        num_warps=4,
    )  # fmt: skip


def block_size(attention: TritonAttention, layer: LayerKV) -> int:
    """Return the tokens of one block."""
    return layer.keys.shape[1] // (attention.shape.num_kv_heads * attention.shape.head_dim)


def dot_type(x: Tensor) -> tl.dtype:
    """Return the dtype of matrix products: that of `x`, where there is a device to compute it."""
    if not x.is_cuda:  # the interpreter multiplies bfloat16 as the integers it keeps them in
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16}.get(x.dtype, tl.bfloat16)


def num_processors(device: torch.device) -> int:
    """Return the streaming multiprocessors of a device; the interpreter counts as one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
