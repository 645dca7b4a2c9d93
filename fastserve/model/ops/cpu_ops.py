"""CpuOps: the parts of a network on a CPU: packed products, fused kernels, paged attention.

Rules: what has no faster form here is the part of the fallback that is handed in, so that every
network runs; without kernels (None: a dtype that has none, or plain torch was asked for) only
products differ.
Must not know: architectures, checkpoints, batches, how kernels are built.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastserve.checkpoint.activation import Activation
from fastserve.model.attention.cpu import CpuAttention
from fastserve.model.attention.interfaces import Attention
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.kernels.cpu import onednn
from fastserve.model.kernels.cpu.kernels import CpuKernels
from fastserve.model.ops.cpu_parts import (
    FusedGatedMLP,
    FusedHeadNorm,
    FusedLayerNorm,
    FusedRMSNorm,
)
from fastserve.model.ops.fused_layers import fuse
from fastserve.model.ops.int8_linear import has_int8_linear, int8_linear
from fastserve.model.ops.interfaces import (
    DecoderLayer,
    HeadNormOp,
    Layers,
    LinearOp,
    MLPOp,
    NormOp,
    Ops,
)
from fastserve.model.ops.packed_linear import PackedLinear
from fastserve.model.ops.panel_linear import make_linear


class CpuOps:
    """Fits `Ops`, for weights and KV of the kernels' dtype."""

    def __init__(
        self, kernels: CpuKernels | None, fallback: Ops, *, has_int8_weights: bool = False
    ) -> None:
        """`has_int8_weights`: whether the kernels' projections quantize what they are given."""
        self._kernels = kernels
        self._fallback = fallback
        self._has_int8_weights = has_int8_weights

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearOp:
        if self._kernels is not None:
            if self._has_int8_weights and has_int8_linear(self._kernels, weight):
                return int8_linear(self._kernels, weight, bias)
            own = make_linear(self._kernels, weight, bias)
            if own is not None:
                return own
        if onednn.can_pack(weight):
            return PackedLinear(weight, bias)
        return self._fallback.linear(weight, bias)

    def rms_norm(self, weight: Tensor, eps: float) -> NormOp:
        if self._kernels is None:
            return self._fallback.rms_norm(weight, eps)
        return FusedRMSNorm(self._kernels, weight, eps)

    def head_rms_norm(self, weight: Tensor, eps: float) -> HeadNormOp:
        if self._kernels is None:
            return self._fallback.head_rms_norm(weight, eps)
        return FusedHeadNorm(self._kernels, weight, eps)

    def layer_norm(self, weight: Tensor | None, bias: Tensor | None, eps: float) -> NormOp:
        if self._kernels is None or weight is None or bias is None:
            return self._fallback.layer_norm(weight, bias, eps)
        return FusedLayerNorm(self._kernels, weight, bias, eps)

    def mlp(self, up: LinearOp, activation: Activation, down: LinearOp) -> MLPOp:
        return self._fallback.mlp(up, activation, down)

    def gated_mlp(self, gate_up: LinearOp, down: LinearOp) -> MLPOp:
        if self._kernels is None:
            return self._fallback.gated_mlp(gate_up, down)
        return FusedGatedMLP(self._kernels, gate_up, down)

    def attention(self, shape: AttentionShape) -> Attention:
        if self._kernels is None:
            return self._fallback.attention(shape)
        return CpuAttention(self._kernels, shape)

    def layers(self, layers: Sequence[DecoderLayer], attention: Attention) -> Layers:
        loop = self._fallback.layers(layers, attention)
        return loop if self._kernels is None else fuse(self._kernels, layers, attention, loop)
