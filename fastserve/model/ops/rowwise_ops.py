"""RowwiseOps: the parts of a network in plain torch, with the same bits for a row in any batch.

Rules: only operations whose result for an element does not depend on where it stands. Built-in
sigmoid, silu, gelu and exp2 do depend on it: the ends of a vector loop and of a thread's share are
computed by another routine. exp, tanh, erf and the four operations of arithmetic do not, nor do
sums over the last dimension of contiguous rows by `vector_norm` and `layer_norm`, which take one
row at a time. Products are left as they are (see TiledLinear).
Must not know: architectures, checkpoints, batches.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastserve.checkpoint.activation import Activation
from fastserve.model.attention.interfaces import Attention
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.attention.tiled import TiledAttention
from fastserve.model.ops.interfaces import LinearOp, MLPOp, NormOp
from fastserve.model.ops.torch_ops import TorchOps


class RowwiseOps(TorchOps):
    """Fits `Ops`, for any dtype."""

    def rms_norm(self, weight: Tensor, eps: float) -> NormOp:
        return RowwiseRMSNorm(weight, eps)

    def mlp(self, up: LinearOp, activation: Activation, down: LinearOp) -> MLPOp:
        return RowwiseMLP(up, activation, down)

    def gated_mlp(self, gate_up: LinearOp, down: LinearOp) -> MLPOp:
        return RowwiseGatedMLP(gate_up, down)

    def attention(self, shape: AttentionShape) -> Attention:
        return TiledAttention(shape)


class RowwiseRMSNorm:
    """x / rms(x) · weight over the last dimension."""

    __slots__ = ("eps", "weight", "width")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight.float()
        self.width = weight.shape[-1]
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.float().contiguous()
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        scale: Tensor = (norm * norm).div_(self.width).add_(self.eps).sqrt_().reciprocal_()
        return (rows * scale).mul_(self.weight).to(x.dtype)


class RowwiseMLP:
    """down(activation(up(x)))."""

    __slots__ = ("activation", "down", "up")

    def __init__(self, up: LinearOp, activation: Activation, down: LinearOp) -> None:
        self.up = up
        self.activation = activation
        self.down = down

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        wide = self.up(x)
        return self.down.add_to(residual, activate(wide.float(), self.activation).to(wide.dtype))


class RowwiseGatedMLP:
    """down(silu(gate(x)) · up(x)), with gate and up in one product."""

    __slots__ = ("down", "gate_up", "width")

    def __init__(self, gate_up: LinearOp, down: LinearOp) -> None:
        self.gate_up = gate_up
        self.down = down
        self.width = gate_up.out_width // 2

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)  # [num_tokens, 2 * intermediate]
        gate = activate(gate_up[:, : self.width].float(), "silu")
        return self.down.add_to(residual, gate.mul_(gate_up[:, self.width :]).to(gate_up.dtype))


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Return the activation of float32 `x`."""
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return x / x.neg().exp_().add_(1.0)
    if activation == "gelu":
        return (x * math.sqrt(0.5)).erf_().add_(1.0).mul_(x).mul_(0.5)
    inner = (x * x).mul_(x).mul_(0.044715).add_(x).mul_(math.sqrt(2.0 / math.pi))
    return inner.tanh_().add_(1.0).mul_(x).mul_(0.5)
