"""CpuKernels: the fused operations of a step on a CPU, by the compiled entries of kernels.cpp.

Rules: tensors are of the kernels' dtype, rows contiguous; statistics and sums are taken in float32.
What is computed for a row or a token depends on nothing but that row, or that token's query and the
keys and values before it: the same bits in any batch, chunking or number of threads. An instance
serves one thread. An entry is the address of `void entry(void* args)`; the first argument counts
the shares of work that threads have taken. Pointers are only passed for tensors that were checked:
dtype, contiguity.
Must not know: networks, requests, how entries come about.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from struct import Struct

import torch
from torch import Tensor

from fastserve.model.attention.interfaces import LayerKV
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.kernels.cpu.attention_work import CHUNK_TOKENS, AttentionWork
from fastserve.model.kernels.cpu.thread_team import find_parallel

ENTRIES = (
    "rms_norm",
    "layer_norm",
    "head_rms_norm",
    "silu_mul",
    "rotate_and_write",
    "attend",
)

PARALLEL_ELEMENTS = 2**15
"""Elements of a row-wise kernel from which waking other threads pays."""

PARALLEL_POSITIONS = 2**10
"""Head positions read by attention from which waking other threads pays."""

PIECES_PER_THREAD = 8
"""With fewer, pieces are cut by heads, for balance."""

TILE = 32  # positions that compiled attention works on at a time

_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Call:
    """One entry, its argument layout and the memory they are packed into."""

    __slots__ = ("address", "arguments", "buffer", "entry", "pack_into", "parallel")

    def __init__(self, address: int, layout: str) -> None:
        packer = Struct(layout)
        self.address = address
        self.entry = _ENTRY(address)
        self.buffer = ctypes.create_string_buffer(packer.size)
        self.arguments = ctypes.addressof(self.buffer)
        self.pack_into = packer.pack_into
        self.parallel = find_parallel()

    def __call__(self, threads: int, *values: int | float) -> None:
        self.pack_into(self.buffer, 0, 0, *values)
        if threads == 1 or self.parallel is None:
            self.entry(self.arguments)
        else:
            self.parallel(self.address, self.arguments, threads, 0)


class CpuKernels:
    """The kernels for one dtype."""

    name = "native"

    def __init__(self, dtype: torch.dtype, entries: Mapping[str, int]) -> None:
        """Take the addresses of ENTRIES for `dtype`."""
        self.dtype = dtype
        self._norm = _Call(entries["rms_norm"], "=7qd")
        self._layer_norm = _Call(entries["layer_norm"], "=7qd")
        self._head_norm = _Call(entries["head_rms_norm"], "=7qd")
        self._silu_mul = _Call(entries["silu_mul"], "=5q")
        self._write = _Call(entries["rotate_and_write"], "=12q")
        self._attend = _Call(entries["attend"], "=18qd")
        self._scratch = torch.empty(0, dtype=torch.float32)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x / rms(x) · weight of the rows of `x` [num_rows, width]."""
        out = torch.empty_like(x)
        rows, width = x.shape
        pointers = (self._pointer(x), self._pointer(weight), 0, out.data_ptr())
        self._norm(_threads(rows * width), *pointers, rows, width, eps)
        return out

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Return (x - mean) / std · weight + bias of the rows of `x` [num_rows, width]."""
        out = torch.empty_like(x)
        rows, width = x.shape
        pointers = (self._pointer(x), self._pointer(weight), self._pointer(bias), out.data_ptr())
        self._layer_norm(_threads(rows * width), *pointers, rows, width, eps)
        return out

    def head_rms_norm_(self, qkv: Tensor, weight: Tensor, eps: float) -> None:
        """Normalize heads in place: `weight` [normed_heads, head_dim] is that of the first ones.

        qkv: [num_tokens, all_heads, head_dim].
        """
        tokens, all_heads, head_dim = qkv.shape
        width = all_heads * head_dim
        pointers = self._pointer(qkv), self._pointer(weight)
        shape = (tokens, width, weight.shape[0], head_dim)
        self._head_norm(_threads(tokens * width), *pointers, *shape, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Return silu(gate) · up: [num_rows, 2 * width] becomes [num_rows, width]."""
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((rows, width))
        threads = _threads(rows * width)
        self._silu_mul(threads, self._pointer(gate_up), out.data_ptr(), rows, width)
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
        both = layer.both
        self._write(
            _threads(tokens * all_heads * head_dim),
            self._pointer(qkv),
            0 if rotations is None else rotations.data_ptr(),
            both.data_ptr(),
            write_blocks.data_ptr(),
            write_offsets.data_ptr(),
            tokens,
            num_heads,
            (all_heads - num_heads) // 2,
            head_dim,
            both.stride(0),
            both.stride(1),
        )

    def attend(
        self,
        qkv: Tensor,  # [num_tokens, heads + 2 * kv_heads, head_dim]; only queries are read
        layer: LayerKV,
        work: AttentionWork,
        out: Tensor,  # [num_tokens, heads * head_dim]; rows that no piece names are left alone
        shape: AttentionShape,
    ) -> None:
        """Write softmax(scale · q Kᵀ) V of each token over the positions up to its own."""
        kv_heads = shape.num_kv_heads
        threads = torch.get_num_threads() if work.positions * kv_heads > PARALLEL_POSITIONS else 1
        num_pieces = len(work.pieces)
        parts = kv_heads if threads > 1 and num_pieces < PIECES_PER_THREAD * threads else 1
        scratch, scratch_stride = self._scratch_for(threads, shape)
        both = layer.both
        self._attend(
            threads,
            0,
            self._pointer(qkv),
            self._pointer(out),
            both.data_ptr(),
            work.pieces.ctypes.data,
            work.tables.ctypes.data,
            scratch,
            scratch_stride,
            num_pieces,
            parts,
            work.tables.shape[1],
            both.shape[2],
            both.stride(0),
            both.stride(1),
            shape.num_heads,
            kv_heads,
            shape.head_dim,
            shape.scale,
        )

    def _scratch_for(self, threads: int, shape: AttentionShape) -> tuple[int, int]:
        """Return memory for every thread, and how many floats each one's is."""
        padded = -(-shape.head_dim // 32) * 32
        rows = max(CHUNK_TOKENS * shape.group_size, shape.num_heads)
        stride = rows * (2 * padded + 2 * TILE + 32) + 2 * TILE * padded + 256
        stride = -(-stride // 16) * 16
        if self._scratch.numel() < stride * threads + 16:
            self._scratch = torch.empty(stride * threads + 16)
        return -(-self._scratch.data_ptr() // 64) * 64, stride

    def _pointer(self, tensor: Tensor) -> int:
        if tensor.dtype is not self.dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{self.name} kernels of {self.dtype} were given {tensor.dtype}, "
                f"shape {tuple(tensor.shape)}, strides {tensor.stride()}"
            )
        return tensor.data_ptr()


def _threads(elements: int) -> int:
    return 1 if elements < PARALLEL_ELEMENTS else torch.get_num_threads()
