"""Norms and the gated MLP by compiled CPU kernels, as the parts that networks call.

Must not know: architectures, attention.
"""

from __future__ import annotations

from torch import Tensor

from fastserve.model.kernels.cpu.kernels import CpuKernels
from fastserve.model.ops.interfaces import LinearOp


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
