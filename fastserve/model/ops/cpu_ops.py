"""CpuOps: the parts of a network on a CPU: packed products, fused kernels, paged attention.

Rules: what has no faster form here is the part of the fallback that is handed in, so that every
network runs; without kernels (None: a dtype that has none, or plain torch was asked for) only
products differ.
Must not know: architectures, checkpoints, batches, how kernels are built.
"""

from __future__ import annotations

from torch import Tensor

from fastserve.checkpoint.activation import Activation
from fastserve.model.attention.cpu import CpuAttention
from fastserve.model.attention.interfaces import Attention
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.kernels.cpu.kernels import CpuKernels
from fastserve.model.ops.interfaces import HeadNormOp, LinearOp, MLPOp, NormOp, Ops
from fastserve.model.ops.packed_linear import PackedLinear, can_pack


class CpuOps:
    """Fits `Ops`, for weights and KV of the kernels' dtype."""

    def __init__(self, kernels: CpuKernels | None, fallback: Ops) -> None:
        self._kernels = kernels
        self._fallback = fallback

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearOp:
        if can_pack(weight):
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


class FusedRMSNorm:
    """x / rms(x) · weight over rows. Fits `NormOp`."""

    __slots__ = ("eps", "kernels", "weight")

    def __init__(self, kernels: CpuKernels, weight: Tensor, eps: float) -> None:
        self.kernels = kernels
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)


class FusedHeadNorm:
    """A norm of the first heads of every token, in place. Fits `HeadNormOp`."""

    __slots__ = ("eps", "kernels", "weight")

    def __init__(self, kernels: CpuKernels, weight: Tensor, eps: float) -> None:
        self.kernels = kernels
        self.weight = weight
        self.eps = eps

    def __call__(self, qkv: Tensor) -> None:
        self.kernels.head_rms_norm_(qkv, self.weight, self.eps)


class FusedLayerNorm:
    """(x - mean(x)) / std(x) · weight + bias over rows. Fits `NormOp`."""

    __slots__ = ("bias", "eps", "kernels", "weight")

    def __init__(self, kernels: CpuKernels, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.kernels = kernels
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.layer_norm(x, self.weight, self.bias, self.eps)


class FusedGatedMLP:
    """down(silu(gate(x)) · up(x)), with gate and up in one product. Fits `MLPOp`."""

    __slots__ = ("down", "gate_up", "kernels")

    def __init__(self, kernels: CpuKernels, gate_up: LinearOp, down: LinearOp) -> None:
        self.kernels = kernels
        self.gate_up = gate_up
        self.down = down

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return self.down.add_to(residual, self.kernels.silu_mul(self.gate_up(x)))
