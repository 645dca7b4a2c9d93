"""CudaOps: the parts of a network on a CUDA device, by Triton kernels where there is one.

Rules: matrix products are cuBLAS's, which takes the residual sum along. What has no kernel here is
the part of the fallback that is handed in. With `is_batch_invariant` attention splits contexts at
fixed positions and takes every token by itself; norms and gates treat each row by itself anyway,
matrix products are not covered.
Imports Triton: only to be imported where it is used. Must not know: architectures, batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastserve.checkpoint.activation import Activation
from fastserve.model.attention.interfaces import Attention
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.attention.triton import FIXED_SPLIT_TOKENS, TritonAttention
from fastserve.model.ops.interfaces import (
    DecoderLayer,
    HeadNormOp,
    Layers,
    LinearOp,
    MLPOp,
    NormOp,
    Ops,
)
from fastserve.model.ops.layers import HeadNorm
from fastserve.model.ops.triton_rowwise import MAX_NORM_WIDTH, TritonGatedMLP, TritonRMSNorm


class CudaOps:
    """Fits `Ops`."""

    def __init__(
        self, dtype: torch.dtype, fallback: Ops, *, is_batch_invariant: bool = False
    ) -> None:
        self._dtype = dtype
        self._fallback = fallback
        self._split_tokens = FIXED_SPLIT_TOKENS if is_batch_invariant else None

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearOp:
        return self._fallback.linear(weight, bias)

    def rms_norm(self, weight: Tensor, eps: float) -> NormOp:
        if weight.shape[-1] > MAX_NORM_WIDTH:
            return self._fallback.rms_norm(weight, eps)
        return TritonRMSNorm(weight, eps)

    def head_rms_norm(self, weight: Tensor, eps: float) -> HeadNormOp:
        return HeadNorm(self.rms_norm(weight, eps), len(weight))

    def layer_norm(self, weight: Tensor | None, bias: Tensor | None, eps: float) -> NormOp:
        return self._fallback.layer_norm(weight, bias, eps)

    def mlp(self, up: LinearOp, activation: Activation, down: LinearOp) -> MLPOp:
        return self._fallback.mlp(up, activation, down)

    def gated_mlp(self, gate_up: LinearOp, down: LinearOp) -> MLPOp:
        return TritonGatedMLP(gate_up, down)

    def attention(self, shape: AttentionShape) -> Attention:
        if not TritonAttention.supports(shape):
            return self._fallback.attention(shape)
        return TritonAttention(shape, self._dtype, split_tokens=self._split_tokens)

    def layers(self, layers: Sequence[DecoderLayer], attention: Attention) -> Layers:
        return self._fallback.layers(layers, attention)
