"""The layers of networks in plain torch, as callables over tensors; any device.

Rules: no per-request Python, no nn.Module (its call overhead is a visible share of a decode step of
a small model). Must not know: paging, batches, checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastserve.checkpoint.activation import Activation
from fastserve.model.ops.interfaces import LinearOp, NormOp


class Linear:
    """y = x Wᵀ + b."""

    is_rowwise = False
    __slots__ = ("bias", "out_width", "transposed", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_width = weight.shape[0]
        self.weight = weight  # [out, in]
        self.transposed = weight.t()
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """Project the rows of `x`."""
        return F.linear(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Add the projection to `residual` in place: the sum is part of the matrix product."""
        if self.bias is not None:
            residual.add_(self.bias)
        return residual.addmm_(x, self.transposed)


class RMSNorm:
    """x / rms(x) · weight over the last dimension."""

    __slots__ = ("eps", "eps_tensor", "shape", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.shape = (weight.shape[-1],)
        self.eps = eps
        self.eps_tensor = torch.full((1,), eps, dtype=weight.dtype, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize; statistics are taken in float32 for half types."""
        if x.dtype != torch.float32:
            return F.rms_norm(x, self.shape, None, self.eps).mul_(self.weight)
        # The same in fewer operations than the built-in one is made of on a CPU.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self.eps_tensor, norm, norm, value=1.0 / self.shape[0]).rsqrt_()
        return (x * scale).mul_(self.weight)


class HeadNorm:
    """A norm of the first heads of every token, in place."""

    __slots__ = ("norm", "num_heads")

    def __init__(self, norm: NormOp, num_heads: int) -> None:
        self.norm = norm
        self.num_heads = num_heads

    def __call__(self, qkv: Tensor) -> None:
        """Normalize them in `qkv` [num_tokens, all_heads, head_dim]."""
        heads = qkv[:, : self.num_heads]
        heads.copy_(self.norm(heads))


class LayerNorm:
    """(x - mean(x)) / std(x) · weight + bias over the last dimension."""

    __slots__ = ("bias", "eps", "weight")

    def __init__(self, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize; the built-in norm takes statistics in float32 for half types."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class MLP:
    """down(activation(up(x)))."""

    __slots__ = ("activation", "down", "up")

    def __init__(self, up: LinearOp, activation: Activation, down: LinearOp) -> None:
        self.up = up
        self.activation = activation
        self.down = down

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Add the layer's output to `residual` in place."""
        return self.down.add_to(residual, activate(self.up(x), self.activation))


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Return the activation of `x`, which may be overwritten."""
    if activation == "relu":
        return F.relu(x, inplace=True)
    if activation == "silu":
        return F.silu(x, inplace=True)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class GatedMLP:
    """down(silu(gate(x)) · up(x)), with gate and up in one product."""

    __slots__ = ("down", "gate_up", "width")

    def __init__(self, gate_up: LinearOp, down: LinearOp) -> None:
        self.gate_up = gate_up
        self.down = down
        self.width = gate_up.out_width // 2

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Add the layer's output to `residual` in place."""
        gate_up = self.gate_up(x)  # [num_tokens, 2 * intermediate]
        gate = F.silu(gate_up[:, : self.width])
        return self.down.add_to(residual, gate.mul_(gate_up[:, self.width :]))
