"""PackedLinear: a projection whose weight lies as oneDNN's kernels read it.

Rules: the packed weight replaces the plain one, so that a weight is held once; a caller that keeps
the plain one (an embedding tied to the head) pays for both. Packed for one row: the layout is the
same for any number of rows, and serves them all. What may be packed is asked with `can_pack`.
Must not know: networks, batches.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

MIN_WIDTH = 32
"""Rows of a weight from which packing pays; a router's few experts, for one, stay plain."""

_pack = torch.ops.mkldnn._reorder_linear_weight.default
_product = torch.ops.mkldnn._linear_pointwise.default


def can_pack(weight: Tensor) -> bool:
    """Whether `weight` [out, in] can be packed here, and its products are the faster for it.

    Measured with AVX-512: the packed product was the faster one at all shapes and numbers of rows
    (docs/performance.md).
    """
    if platform.machine() not in ("x86_64", "AMD64") or not torch._C._has_mkldnn:
        return False
    if weight.device.type != "cpu" or min(weight.shape) < MIN_WIDTH:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class PackedLinear:
    """y = x Wᵀ + b. Fits `LinearOp`."""

    is_rowwise = False
    __slots__ = ("bias", "out_width", "packed")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_width = weight.shape[0]
        self.packed = _pack(weight.contiguous(), 1)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = _product(x, self.packed, self.bias, "none", [], "")
        return y

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual.add_(_product(x, self.packed, self.bias, "none", [], ""))
