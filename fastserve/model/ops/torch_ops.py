"""TorchOps: the parts of a network in plain torch; they run on any device.

Must not know: architectures, checkpoints, batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastserve.checkpoint.activation import Activation
from fastserve.model.attention.gathered import GatheredAttention
from fastserve.model.attention.interfaces import Attention
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.ops.interfaces import (
    DecoderLayer,
    HeadNormOp,
    Layers,
    LinearOp,
    MLPOp,
    NormOp,
)
from fastserve.model.ops.layer_loop import LayerLoop
from fastserve.model.ops.layers import MLP, GatedMLP, HeadNorm, LayerNorm, Linear, RMSNorm


class TorchOps:
    """Fits `Ops`, for weights and KV of one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearOp:
        return Linear(weight, bias)

    def rms_norm(self, weight: Tensor, eps: float) -> NormOp:
        return RMSNorm(weight, eps)

    def head_rms_norm(self, weight: Tensor, eps: float) -> HeadNormOp:
        """Fit `Ops`, by this device's norm of rows."""
        return HeadNorm(self.rms_norm(weight, eps), len(weight))

    def layer_norm(self, weight: Tensor | None, bias: Tensor | None, eps: float) -> NormOp:
        return LayerNorm(weight, bias, eps)

    def mlp(self, up: LinearOp, activation: Activation, down: LinearOp) -> MLPOp:
        return MLP(up, activation, down)

    def gated_mlp(self, gate_up: LinearOp, down: LinearOp) -> MLPOp:
        return GatedMLP(gate_up, down)

    def attention(self, shape: AttentionShape) -> Attention:
        return GatheredAttention(shape, self._dtype)

    def layers(self, layers: Sequence[DecoderLayer], attention: Attention) -> Layers:
        return LayerLoop(layers, attention)
