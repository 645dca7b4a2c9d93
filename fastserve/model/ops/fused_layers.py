"""FusedLayers: the layers of a network on a CPU as one call of compiled kernels.

Rules: only layers are taken that are made of this device's own parts, and of each part its kernel
is run, so that the bits are those of the parts called one by one. Steps of more rows than our own
products are used for run in the plain loop. One thread at a time may call.
Must not know: architectures, checkpoints, requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastserve.model.attention.cpu import CpuAttention
from fastserve.model.attention.interfaces import Attention, PagedKV
from fastserve.model.decoder_parts import PreNormLayer
from fastserve.model.input_batch import InputBatch
from fastserve.model.kernels.cpu.attention_work import attention_work
from fastserve.model.kernels.cpu.kernels import CpuKernels, Slots
from fastserve.model.kernels.cpu.layer_program import LayerProgram, LayerShape, LayersStep
from fastserve.model.ops.cpu_parts import FusedGatedMLP, FusedHeadNorm, FusedRMSNorm
from fastserve.model.ops.interfaces import DecoderLayer, Layers
from fastserve.model.ops.panel_linear import PanelLinear


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """The parts of one layer."""

    attention_norm: FusedRMSNorm
    qkv: PanelLinear
    head_norm: FusedHeadNorm | None
    output: PanelLinear
    mlp_norm: FusedRMSNorm
    mlp: FusedGatedMLP
    gate_up: PanelLinear
    down: PanelLinear

    @classmethod
    def of(cls, layer: DecoderLayer) -> FusedLayer | None:
        """Return the parts of a layer; None where another part is among them."""
        match layer:
            case PreNormLayer(
                attention_norm=FusedRMSNorm() as attention_norm,
                qkv=PanelLinear() as qkv,
                head_norm=(None | FusedHeadNorm()) as head_norm,
                output=PanelLinear() as output,
                mlp_norm=FusedRMSNorm() as mlp_norm,
                mlp=FusedGatedMLP(
                    gate_up=PanelLinear() as gate_up, down=PanelLinear() as down
                ) as mlp,
            ):
                return cls(attention_norm, qkv, head_norm, output, mlp_norm, mlp, gate_up, down)
        return None

    def values(self, kv: int, threads: int) -> tuple[int, ...]:
        """Return what the struct `Layer` of layers.h holds."""
        return (
            self.attention_norm.weight.data_ptr(),
            self.mlp_norm.weight.data_ptr(),
            0 if self.head_norm is None else self.head_norm.weight.data_ptr(),
            kv,
            *self.qkv.panels.values(threads),
            *self.output.panels.values(threads),
            *self.gate_up.panels.values(threads),
            *self.down.panels.values(threads),
        )


class FusedLayers:
    """Fits `Layers`."""

    def __init__(
        self,
        kernels: CpuKernels,
        layers: Sequence[FusedLayer],
        attention: CpuAttention,
        loop: Layers,
    ) -> None:
        """Take layers of one shape, and what runs them one part after the other."""
        first = layers[0]
        self.loop = loop
        self.attention = attention
        self._layers = layers
        self._max_rows = first.qkv.max_rows
        self._team = kernels.team
        shape = LayerShape(
            attention=attention.shape,
            hidden=first.output.out_width,
            qkv=first.qkv.out_width,
            inner=first.gate_up.out_width // 2,
            attention_eps=first.attention_norm.eps,
            mlp_eps=first.mlp_norm.eps,
            head_eps=0.0 if first.head_norm is None else first.head_norm.eps,
        )
        self._program = LayerProgram(kernels, shape)
        self._packed_for: tuple[int, int] | None = None
        self._packed = torch.empty(0, dtype=torch.int64)

    def __call__(
        self,
        hidden: Tensor,
        rotations: Tensor | None,
        batch: InputBatch,
        kv: PagedKV,
        scored: Tensor | None,
    ) -> Tensor:
        if len(hidden) > self._max_rows:
            return self.loop(hidden, rotations, batch, kv, scored)
        step = LayersStep(
            hidden=hidden,
            scored=scored,
            slots=Slots(rotations, batch.write_blocks, batch.write_offsets),
            work=attention_work(batch.rows, self.attention.shape.group_size),
            kv=kv.layers[0],
        )
        return self._program(self._pack(kv), step)

    def _pack(self, kv: PagedKV) -> Tensor:
        """Return the layers as kernels read them."""
        threads = self._team.size
        key = (kv.tensor.data_ptr(), threads)
        if key != self._packed_for:
            pairs = zip(self._layers, kv.layers, strict=True)
            rows = [layer.values(layer_kv.both.data_ptr(), threads) for layer, layer_kv in pairs]
            self._packed, self._packed_for = torch.tensor(rows, dtype=torch.int64), key
        return self._packed


def fuse(
    kernels: CpuKernels, layers: Sequence[DecoderLayer], attention: Attention, loop: Layers
) -> Layers:
    """Return the layers as one call where they are made of the right parts, else `loop`."""
    fused = [FusedLayer.of(layer) for layer in layers]
    whole = [layer for layer in fused if layer is not None]
    if not whole or len(whole) < len(fused) or not isinstance(attention, CpuAttention):
        return loop
    return FusedLayers(kernels, whole, attention, loop)
