"""CpuKernels: the fused operations of a step on a CPU, by the compiled entries of kernels.cpp.

Rules: tensors are of the kernels' dtype, rows contiguous; statistics and sums are taken in float32.
What is computed for a row or a token depends on nothing but that row, or that token's query and the
keys and values before it: the same bits in any batch, chunking or number of threads; where AMX's
tiles are used from some number of rows on, on which side of it a row is too. An instance serves one
thread. An entry is `void entry(Threads* threads, void* arguments)`. Pointers are only
passed for tensors that were checked: dtype, contiguity.
Must not know: networks, requests, how entries come about.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from struct import Struct

import torch
from torch import Tensor

from fastserve.model.attention.interfaces import LayerKV
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.kernels.cpu.attention_work import PIECE_QUERIES, AttentionWork
from fastserve.model.kernels.cpu.panels import Panels
from fastserve.model.kernels.cpu.thread_team import ThreadTeam
from fastserve.model.kernels.cpu.weight_memory import WeightMemory

ENTRIES = (
    "rms_norm",
    "layer_norm",
    "head_rms_norm",
    "silu_mul",
    "rotate_and_write",
    "attend",
    "project",
    "run_layers",
)

PARALLEL_ELEMENTS = 2**15
"""Elements of a row-wise kernel from which waking other threads pays."""

PARALLEL_POSITIONS = 2**10
"""Head positions read by attention from which waking other threads pays."""

PARALLEL_PRODUCTS = 2**17
"""Single products of a projection from which waking other threads pays."""

PIECES_PER_THREAD = 4
"""With fewer, pieces are cut by heads, for balance: no further than that, for heads that are read
together lie side by side."""

SPAN = 32  # positions that compiled attention works on at a time
TILE_ROWS = 16  # of AMX's tiles, which may reach behind the queries of a key-value head

WRITE_LAYOUT = "11q"
ATTEND_LAYOUT = "17qd"

Entry = Callable[[int, int], None]
"""Addresses of threads and of arguments."""


class Call:
    """One entry, its argument layout and the memory they are packed into."""

    __slots__ = ("arguments", "buffer", "entry", "pack_into")

    def __init__(self, entry: Entry, layout: str) -> None:
        packer = Struct(layout)
        self.entry = entry
        self.buffer = ctypes.create_string_buffer(packer.size)
        self.arguments = ctypes.addressof(self.buffer)
        self.pack_into = packer.pack_into

    def __call__(self, threads: int, *values: int | float) -> None:
        self.pack_into(self.buffer, 0, *values)
        self.entry(threads, self.arguments)


@dataclass(frozen=True, slots=True)
class Slots:
    """Where the step's tokens stand, and where their keys and values go."""

    rotations: Tensor | None  # [num_tokens, 1, head_dim / 2] complex64
    blocks: Tensor  # [num_tokens] int64
    offsets: Tensor  # [num_tokens] int64

    def values(
        self, qkv: int, layer: LayerKV, heads: int, kv_heads: int, head_dim: int
    ) -> tuple[int, ...]:
        """Return what the struct `WriteArgs` of row_kernels.h holds."""
        rotations, both = self.rotations, layer.both
        return (
            qkv,
            0 if rotations is None else rotations.data_ptr(),
            both.data_ptr(),
            self.blocks.data_ptr(),
            self.offsets.data_ptr(),
            len(self.blocks),
            heads,
            kv_heads,
            head_dim,
            both.stride(0),
            both.stride(1),
        )


def _name(max_rows: float, tile_rows: int) -> str:
    """Return what tells kernels apart that take other times for the same."""
    if tile_rows == 0:
        return "native"
    return f"native-amx{tile_rows}" + ("" if math.isinf(max_rows) else f"-{max_rows:.0f}")


class CpuKernels:
    """The kernels for one dtype."""

    def __init__(
        self,
        dtype: torch.dtype,
        entries: Mapping[str, Entry],
        team: ThreadTeam,
        *,
        per_lane: int,
        max_rows: float,
        tile_rows: int = 0,
    ) -> None:
        """Take ENTRIES for `dtype`, which add up `per_lane` products with one instruction.

        Up to `max_rows` rows `project` is to be used rather than oneDNN's product. From `tile_rows`
        rows on products are computed in AMX's tiles; 0: never.
        """
        self.dtype = dtype
        self.max_rows = max_rows
        self.tile_rows = tile_rows
        self.name = _name(max_rows, tile_rows)
        self.per_lane = per_lane
        self.team = team
        self.weights = WeightMemory()
        self.run_layers = entries["run_layers"]
        self._norm = Call(entries["rms_norm"], "=6qd")
        self._layer_norm = Call(entries["layer_norm"], "=6qd")
        self._head_norm = Call(entries["head_rms_norm"], "=6qd")
        self._silu_mul = Call(entries["silu_mul"], "=4q")
        self._write = Call(entries["rotate_and_write"], f"={WRITE_LAYOUT}")
        self._attend = Call(entries["attend"], f"={ATTEND_LAYOUT}")
        self._project = Call(entries["project"], "=12q")
        self._scratch = torch.empty(0, dtype=torch.float32)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x / rms(x) · weight of the rows of `x` [num_rows, width]."""
        out = torch.empty_like(x)
        rows, width = x.shape
        pointers = (self.pointer(x), self.pointer(weight), 0, out.data_ptr())
        self._norm(self._threads(rows, width), *pointers, rows, width, eps)
        return out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Return (x - mean) / std · weight + bias of the rows of `x` [num_rows, width]."""
        out = torch.empty_like(x)
        rows, width = x.shape
        pointers = (self.pointer(x), self.pointer(weight), self.pointer(bias), out.data_ptr())
        self._layer_norm(self._threads(rows, width), *pointers, rows, width, eps)
        return out

    def head_rms_norm_(self, qkv: Tensor, weight: Tensor, eps: float) -> None:
        """Normalize heads in place: `weight` [normed_heads, head_dim] is that of the first ones.

        qkv: [num_tokens, all_heads, head_dim].
        """
        tokens, all_heads, head_dim = qkv.shape
        width = all_heads * head_dim
        pointers = self.pointer(qkv), self.pointer(weight)
        shape = (tokens, width, weight.shape[0], head_dim)
        self._head_norm(self._threads(tokens, width), *pointers, *shape, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) · up: [num_rows, 2 * width] becomes [num_rows, width]."""
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((rows, width))
        threads = self._threads(rows, width)
        self._silu_mul(threads, self.pointer(gate_up), out.data_ptr(), rows, width)
        return out

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
        tokens, all_heads, head_dim = qkv.shape
        threads = self._threads(tokens, all_heads * head_dim)
        slots = Slots(rotations, write_blocks, write_offsets)
        heads = num_heads, (all_heads - num_heads) // 2, head_dim
        self._write(threads, *slots.values(self.pointer(qkv), layer, *heads))

    def attend(
        self,
        qkv: Tensor,  # [num_tokens, heads + 2 * kv_heads, head_dim]; only queries are read
        layer: LayerKV,
        work: AttentionWork,
        out: Tensor,  # [num_tokens, heads * head_dim]; rows that no piece names are left alone
        shape: AttentionShape,
    ) -> None:
        """Write softmax(scale · q Kᵀ) V of each token over the positions up to its own."""
        is_parallel = work.positions * shape.num_kv_heads > PARALLEL_POSITIONS
        threads = self.threads(len(qkv)) if is_parallel else self.team.alone
        pointers = self.pointer(qkv), self.pointer(out)
        self._attend(threads, *self.attend_values(*pointers, layer, work, shape))

    def project(self, x: Tensor, weight: Panels, out: Tensor | None = None) -> Tensor:
        """Return x Wᵀ + b of the rows of `x` [num_rows, depth], added to `out` if there is one."""
        rows, depth = x.shape
        if depth != weight.depth or (out is not None and out.shape != (rows, weight.width)):
            raise ValueError(f"a weight of {weight.width} x {weight.depth} given {tuple(x.shape)}")
        adds = out is not None
        if out is None:
            out = x.new_empty((rows, weight.width))
        is_parallel = rows * depth * weight.width >= PARALLEL_PRODUCTS
        threads = self.team.own() if is_parallel else self.team.alone
        *addresses, depth, width, stride, columns = weight.values(self.team.size)
        pointers = self.pointer(x), *addresses, self.pointer(out)
        shape = rows, depth, width, stride, columns
        self._project(threads, *pointers, *shape, adds, self.tile_rows)
        return out

    def attend_values(
        self, qkv: int, out: int, layer: LayerKV, work: AttentionWork, shape: AttentionShape
    ) -> tuple[int | float, ...]:
        """Return what the struct `AttendArgs` of attention.h holds."""
        threads, num_pieces = self.team.size, len(work.pieces)
        wanted = -(-PIECES_PER_THREAD * threads // max(num_pieces, 1)) if threads > 1 else 1
        parts = next(
            (n for n in range(wanted, shape.num_kv_heads) if shape.num_kv_heads % n == 0),
            shape.num_kv_heads,
        )
        both = layer.both
        return (
            qkv,
            out,
            both.data_ptr(),
            work.pieces.data_ptr(),
            work.tables.data_ptr(),
            *self._scratch_for(threads, shape),
            num_pieces,
            parts,
            work.tables.shape[1],
            both.shape[2],
            both.stride(0),
            both.stride(1),
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            self.tile_rows,
            shape.scale,
        )

    @property
    def is_rowwise(self) -> bool:
        """Whether the bits of a row are its own, however many rows there are."""
        return self.tile_rows <= 1

    def threads(self, rows: int) -> int:
        """Return all threads: of our own for rows whose products are ours too, else torch's."""
        return self.team.own() if rows <= self.max_rows else self.team.shared()

    def _threads(self, rows: int, width: int) -> int:
        return self.team.alone if rows * width < PARALLEL_ELEMENTS else self.threads(rows)

    def _scratch_for(self, threads: int, shape: AttentionShape) -> tuple[int, int]:
        """Return memory for every thread, and how many floats each one's is."""
        padded = -(-shape.head_dim // 32) * 32
        rows = max(PIECE_QUERIES, shape.num_heads)
        if self.tile_rows:
            rows += TILE_ROWS * shape.num_kv_heads
        stride = rows * (2 * padded + 2 * SPAN + 32) + 2 * SPAN * padded + 256
        stride = -(-stride // 16) * 16
        if self._scratch.numel() < stride * threads + 16:
            self._scratch = torch.empty(stride * threads + 16)
        return -(-self._scratch.data_ptr() // 64) * 64, stride

    def pointer(self, tensor: Tensor) -> int:
        """Return where the numbers of a tensor lie; ValueError for one of another kind."""
        if tensor.dtype is not self.dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{self.name} kernels of {self.dtype} were given {tensor.dtype}, "
                f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
            )
        return tensor.data_ptr()
