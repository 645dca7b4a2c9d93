"""Kernels that treat every row by itself: RMSNorm, and silu(gate) · up.

Must not know: attention.
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    out,  # [tokens, heads, width], contiguous
    x,  # the same shape, strided
    weight,  # [heads, width]
    eps,
    stride_token,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write x / rms(x), rounded to the dtype, times weight, of one row."""
    row = tl.program_id(0).to(tl.int64)
    token, head = row // HEADS, row % HEADS
    columns = tl.arange(0, BLOCK)
    is_real = columns < WIDTH
    source = x + token * stride_token + head * WIDTH
    values = tl.load(source + columns, mask=is_real, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    element = out.dtype.element_ty
    normed = (values * scale).to(element).to(tl.float32)
    factors = tl.load(weight + head * WIDTH + columns, mask=is_real, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + columns, (normed * factors).to(element), mask=is_real)


@triton.jit
def silu_mul_kernel(
    out,  # [tokens, width]
    gate_up,  # [tokens, 2 * width]: gate, then up
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write silu(gate) · up of a piece of one row."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_real = columns < WIDTH
    source = gate_up + token * (2 * WIDTH) + columns
    gate = tl.load(source, mask=is_real, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=is_real, other=0.0).to(tl.float32)
    mixed = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + token * WIDTH + columns, mixed.to(out.dtype.element_ty), mask=is_real)
