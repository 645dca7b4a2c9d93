"""CudaOps: the parts of a network on a CUDA device, by Triton kernels where there is one.

Rules: matrix products are cuBLAS's, which takes the residual sum along. What has no kernel here is
plain torch. With `is_batch_invariant` attention splits contexts at fixed positions and takes every
token by itself; norms and gates treat each row by itself anyway, matrix products are not covered.
Imports Triton: only to be imported where it is used. Must not know: architectures, batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve.model.attention.interfaces import Attention
from fastserve.model.attention.triton import FIXED_SPLIT_TOKENS, TritonAttention
from fastserve.model.ops.interfaces import LinearOp, MLPOp, NormOp
from fastserve.model.ops.torch_ops import TorchOps
from fastserve.model.ops.triton_rowwise import MAX_NORM_WIDTH, TritonGatedMLP, TritonRMSNorm


class CudaOps(TorchOps):
    """Fits `Ops`."""

    def __init__(self, dtype: torch.dtype, *, is_batch_invariant: bool = False) -> None:
        super().__init__(dtype)
        self._attention_dtype = dtype
        self._split_tokens = FIXED_SPLIT_TOKENS if is_batch_invariant else None

    def rms_norm(self, weight: Tensor, eps: float) -> NormOp:
        """Fit `Ops`."""
        if weight.shape[-1] > MAX_NORM_WIDTH:
            return super().rms_norm(weight, eps)
        return TritonRMSNorm(weight, eps)

    def gated_mlp(self, gate_up: LinearOp, down: LinearOp) -> MLPOp:
        """Fit `Ops`."""
        return TritonGatedMLP(gate_up, down)

    def attention(self, *, num_heads: int, num_kv_heads: int, head_dim: int) -> Attention:
        """Fit `Ops`."""
        return TritonAttention(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=self._attention_dtype,
            split_tokens=self._split_tokens,
        )
