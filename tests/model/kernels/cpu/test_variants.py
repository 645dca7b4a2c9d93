"""The kernels as they are built for other processors that this one can stand in for."""

from __future__ import annotations

import math
import platform
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastserve.model.attention.cpu import CpuAttention
from fastserve.model.attention.interfaces import PagedKV
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.kernels.cpu import native
from fastserve.model.kernels.cpu.kernel_choice import choose_kernels
from fastserve.model.ops.panel_linear import panel_linear
from tests.model.attention.test_cpu import reference
from tests.model.attention.test_interfaces import make_batch
from tests.model.kernels.cpu.kernel_cases import TOLERANCES, every_dtype, threads

VARIANTS = {"x86-64-v3": "avx2", "x86-64-v4": "avx512f"}


def can_run(flag: str) -> bool:
    """Whether this processor has what a variant is built for."""
    info = Path("/proc/cpuinfo")
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return is_x86 and info.is_file() and f" {flag} " in info.read_text(encoding="utf-8")


@pytest.mark.slow
@every_dtype
@pytest.mark.parametrize("variant", VARIANTS)
def test_vectors_of_any_width_are_right(variant, dtype, monkeypatch):
    """Without bfloat16 products, and without AVX-512: projections and attention, any row alone."""
    if not can_run(VARIANTS[variant]):
        pytest.skip(f"no {VARIANTS[variant]} here")
    flags = tuple(flag.replace("native", variant) for flag in native.FLAGS)
    monkeypatch.setattr(native, "FLAGS", flags)
    kernels = choose_kernels("native", dtype, max_rows=math.inf)
    assert kernels is not None
    assert kernels.per_lane == 1
    torch.manual_seed(0)
    tolerance = TOLERANCES[dtype]
    for width, depth in ((64, 64), (97, 33), (130, 200)):
        weight, bias = (torch.randn(width, depth) / depth**0.5).to(dtype), torch.randn(width)
        linear = panel_linear(kernels, weight, bias.to(dtype))
        x = torch.randn(23, depth).to(dtype)
        exact = F.linear(x.double(), weight.double(), bias.to(dtype).double())
        for count in (1, 2):
            with threads(count):
                torch.testing.assert_close(
                    linear(x).double(), exact, rtol=tolerance, atol=tolerance
                )
                assert torch.equal(linear(x), torch.cat([linear(row[None]) for row in x]))
    batch = make_batch([(1, 40), (7, 3), (19, 0)], 4, 30, 0)
    kv = PagedKV(torch.randn(30, 1, 2, 4, 2, 20).to(dtype))
    qkv = torch.randn(len(batch.token_ids), 8, 20).to(dtype)
    attention = CpuAttention(kernels, AttentionShape.scaled_by_dim(4, 2, 20))
    actual = attention.plan(batch)(qkv, None, kv.layers[0])
    expected = reference(qkv, kv.layers[0], batch, 4)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
