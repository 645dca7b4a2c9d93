"""oneDNN's product by a packed weight, of torch's private operations.

Must not know: networks, which products are its own.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

MIN_WIDTH = 32
"""Rows of a weight from which packing pays; a router's few experts, for one, stay plain."""

address = torch.ops.mkldnn.data_ptr.default
num_bytes = torch.ops.mkldnn._nbytes.default
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


def pack(weight: Tensor) -> Tensor:
    """Return a weight as oneDNN reads it, for one row: the layout serves any number of them."""
    packed: Tensor = _pack(weight.contiguous(), 1)
    return packed


def product(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b of a packed weight."""
    y: Tensor = _product(x, packed, bias, "none", [], "")
    return y
