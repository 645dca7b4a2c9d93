"""Norms and gated MLPs by Triton kernels, as the parts that networks call.

Must not know: architectures, attention.
"""

from __future__ import annotations

import triton
from torch import Tensor

from fastserve.model.kernels.triton.rowwise import (
    rms_norm_kernel,
    silu_mul_kernel,
)
from fastserve.model.ops.interfaces import LinearOp

MAX_NORM_WIDTH = 2**15
"""One program holds a row in its registers."""


class TritonRMSNorm:
    """x / rms(x) · weight; a weight of several rows is one per head."""

    __slots__ = ("eps", "heads", "weight", "width")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight.contiguous()
        self.eps = eps
        self.width = weight.shape[-1]
        self.heads = weight.numel() // self.width

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize `x` [num_tokens, width] or [num_tokens, heads, width]."""
        inner = x.unsqueeze(1) if x.dim() == 2 else x
        if inner.shape[1:] != (self.heads, self.width) or inner.stride()[1:] != (self.width, 1):
            raise ValueError(f"a norm over {tuple(self.weight.shape)} given {tuple(x.shape)}")
        out = x.new_empty(x.shape)
        if not len(x):  # a step that samples nothing ends with no rows
            return out
        block = triton.next_power_of_2(self.width)
        rms_norm_kernel[(len(x) * self.heads,)](
            out, x, self.weight, self.eps, x.stride(0),
            HEADS=self.heads,
            WIDTH=self.width,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
        return out


class TritonGatedMLP:
    """down(silu(gate(x)) · up(x)), with gate and up in one product."""

    __slots__ = ("down", "gate_up")

    def __init__(self, gate_up: LinearOp, down: LinearOp) -> None:
        self.gate_up = gate_up
        self.down = down

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Add the layer's output to `residual` in place: the sum is part of the last product."""
        return self.down.add_to(residual, silu_mul(self.gate_up(x)))


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) · up of `gate_up` [num_tokens, 2 * width]."""
    if not gate_up.is_contiguous():
        raise ValueError("gate and up must be one contiguous tensor")
    num_tokens, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, width)
    if not num_tokens:
        return out
    block = min(1024, triton.next_power_of_2(width))
    silu_mul_kernel[(num_tokens, triton.cdiv(width, block))](
        out, gate_up, WIDTH=width, BLOCK=block, num_warps=4
    )
    return out
