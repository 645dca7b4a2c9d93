"""LayerProgram: layers of a network as one call, whose stages are the kernels of one dtype.

Rules: what passes from stage to stage lies in memory that is kept from step to step. The bits are
those of the kernels called one by one. An instance serves one thread.
Must not know: networks, requests, of which parts layers are made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastserve.model.attention.interfaces import LayerKV
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.kernels.cpu.attention_work import AttentionWork
from fastserve.model.kernels.cpu.kernels import ATTEND_LAYOUT, WRITE_LAYOUT, Call, CpuKernels, Slots

ALIGNMENT = 64  # elements


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What is the same in all layers."""

    attention: AttentionShape
    hidden: int  # elements of a token's row in the stream
    qkv: int
    inner: int  # of the MLP
    attention_eps: float
    mlp_eps: float
    head_eps: float


@dataclass(frozen=True, slots=True)
class LayersStep:
    """What layers are run over."""

    hidden: Tensor  # [num_tokens, hidden]; overwritten
    scored: Tensor | None  # [num_scored] rows that go through the end of the last layer; None: all
    slots: Slots
    work: AttentionWork
    kv: LayerKV  # of any layer: all are cut alike


class LayerProgram:
    """Runs layers of one shape."""

    def __init__(self, kernels: CpuKernels, shape: LayerShape) -> None:
        self._kernels = kernels
        self._shape = shape
        self._call = Call(kernels.run_layers, f"=14q3d{WRITE_LAYOUT}{ATTEND_LAYOUT}")
        self._buffer = torch.empty(0, dtype=kernels.dtype)

    def __call__(self, layers: Tensor, step: LayersStep) -> Tensor:
        """Run layers, each a row of what the struct `Layer` of layers.h holds.

        Returns the stream, or the rows of it that are scored.
        """
        kernels, shape, kv, scored = self._kernels, self._shape, step.kv, step.scored
        rows = len(step.hidden)
        num_scored = rows if scored is None else len(scored)
        out = step.hidden
        if scored is not None:
            out = out.new_empty((num_scored, shape.hidden))
        heads = shape.attention.num_heads, shape.attention.num_kv_heads, shape.attention.head_dim
        self._call(
            kernels.team.own(),
            layers.data_ptr(),
            len(layers),
            kernels.pointer(step.hidden),
            0 if scored is None else scored.data_ptr(),
            out.data_ptr(),
            *self._buffers(rows, num_scored),
            rows,
            num_scored,
            kernels.tile_rows,
            shape.attention_eps,
            shape.mlp_eps,
            shape.head_eps,
            *step.slots.values(0, kv, *heads),
            *kernels.attend_values(0, 0, kv, step.work, shape.attention),
        )
        return out

    def _buffers(self, rows: int, num_scored: int) -> list[int]:
        """Return memory for what passes from stage to stage, in the order of `LayersArgs`."""
        shape, most = self._shape, max(rows, num_scored)  # a row may be scored several times
        sizes = (
            most * shape.hidden,
            rows * shape.attention.width,
            num_scored * shape.attention.width,
            rows * shape.qkv,
            most * 2 * shape.inner,
            most * shape.inner,
        )
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        if self._buffer.numel() < starts[-1] + ALIGNMENT:
            self._buffer = torch.empty(starts[-1] + ALIGNMENT, dtype=self._buffer.dtype)
        first = -(-self._buffer.data_ptr() // ALIGNMENT) * ALIGNMENT
        return [first + start * self._buffer.itemsize for start in starts[:-1]]
