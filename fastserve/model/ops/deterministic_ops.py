"""DeterministicOps: parts whose results for a token have the same bits whatever the batch.

Rules: the parts that are handed in treat every row by itself already, except for some products;
here these are cut into tiles of proven heights. What a row's bits do depend on: the weights, the
machine, the build of torch and of the kernels, and the number of threads.
Must not know: devices, architectures, batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastserve.checkpoint.activation import Activation
from fastserve.model.attention.interfaces import Attention
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.ops.interfaces import (
    DecoderLayer,
    HeadNormOp,
    Layers,
    LinearOp,
    MLPOp,
    NormOp,
    Ops,
)
from fastserve.model.ops.tiled_linear import TiledLinear, agreeing_heights

Shape = tuple[int, int, bool, torch.dtype]  # in, out, has bias


class DeterministicOps:
    """Fits `Ops`."""

    def __init__(self, parts: Ops) -> None:
        self._parts = parts
        self._heights: dict[Shape, tuple[int, ...]] = {}

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearOp:
        """Fit `Ops`; the first one of its shape also shows which heights may be used."""
        whole = self._parts.linear(weight, bias)
        if whole.is_rowwise:
            return whole
        out_width, in_width = weight.shape
        shape = (in_width, out_width, bias is not None, weight.dtype)
        if shape not in self._heights:
            self._heights[shape] = agreeing_heights(
                self._parts.linear,
                in_width=in_width,
                out_width=out_width,
                has_bias=bias is not None,
                dtype=weight.dtype,
                device=weight.device,
            )
        return TiledLinear(whole, self._heights[shape])

    def rms_norm(self, weight: Tensor, eps: float) -> NormOp:
        return self._parts.rms_norm(weight, eps)

    def head_rms_norm(self, weight: Tensor, eps: float) -> HeadNormOp:
        return self._parts.head_rms_norm(weight, eps)

    def layer_norm(self, weight: Tensor | None, bias: Tensor | None, eps: float) -> NormOp:
        return self._parts.layer_norm(weight, bias, eps)

    def mlp(self, up: LinearOp, activation: Activation, down: LinearOp) -> MLPOp:
        return self._parts.mlp(up, activation, down)

    def gated_mlp(self, gate_up: LinearOp, down: LinearOp) -> MLPOp:
        return self._parts.gated_mlp(gate_up, down)

    def attention(self, shape: AttentionShape) -> Attention:
        return self._parts.attention(shape)

    def layers(self, layers: Sequence[DecoderLayer], attention: Attention) -> Layers:
        return self._parts.layers(layers, attention)
