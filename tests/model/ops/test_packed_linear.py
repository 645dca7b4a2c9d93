"""Tests for fastserve.model.ops.packed_linear against the plain product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastserve.model.kernels.cpu.onednn import MIN_WIDTH, can_pack
from fastserve.model.ops.layers import Linear
from fastserve.model.ops.packed_linear import PackedLinear

pytestmark = pytest.mark.skipif(
    not can_pack(torch.zeros(64, 64)), reason="oneDNN packs no weights on this machine"
)

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def make(rows: int, out_width: int, in_width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return x, a weight and a bias."""
    generator = torch.Generator().manual_seed(rows * 31 + out_width)
    shapes = ((rows, in_width), (out_width, in_width), (out_width,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight / in_width**0.5, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out_width", "in_width"), [(64, 64), (97, 33), (130, 200), (51, 384)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_packed_product_is_the_plain_one(
    dtype: torch.dtype, out_width: int, in_width: int, has_bias: bool
) -> None:
    """For any number of rows, odd widths included."""
    for rows in (1, 2, 7, 8, 32, 65, 600):
        x, weight, some_bias = make(rows, out_width, in_width, dtype)
        bias = some_bias if has_bias else None
        assert can_pack(weight)
        with torch.inference_mode():
            y = PackedLinear(weight, bias)(x)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert y.dtype is dtype
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_adding_to_the_stream_is_in_place(dtype: torch.dtype, has_bias: bool) -> None:
    """`add_to` returns the very residual, changed as the plain part changes it."""
    for rows in (1, 8, 600):
        x, weight, some_bias = make(rows, 96, 160, dtype)
        bias = some_bias if has_bias else None
        residual = torch.randn(rows, 96).to(dtype)
        expected = Linear(weight, bias).add_to(residual.double().to(dtype), x)
        with torch.inference_mode():
            returned = PackedLinear(weight, bias).add_to(residual, x)
        assert returned is residual
        tolerance = 2 * TOLERANCE[dtype]
        torch.testing.assert_close(residual, expected, rtol=tolerance, atol=tolerance)


def test_packing_keeps_no_view_of_the_weight() -> None:
    """The plain weight may change or go once it is packed."""
    x, weight, _ = make(4, 64, 64, torch.float32)
    linear = PackedLinear(weight)
    before = linear(x)
    weight.zero_()
    assert torch.equal(linear(x), before)
    assert linear.out_width == 64


def test_a_weight_that_is_no_row_major_matrix_is_packed_too() -> None:
    """GPT-2 stores matrices transposed; a part of a fused matrix is a view."""
    x, weight, _ = make(3, 64, 80, torch.float32)
    torch.testing.assert_close(PackedLinear(weight.t().contiguous().t())(x), F.linear(x, weight))
    torch.testing.assert_close(PackedLinear(weight[32:])(x), F.linear(x, weight[32:]))


def test_what_is_not_packed() -> None:
    """Narrow weights, such as a router's, and dtypes that oneDNN packs no weights for."""
    assert not can_pack(torch.zeros(MIN_WIDTH - 1, 512))
    assert not can_pack(torch.zeros(512, MIN_WIDTH - 1))
    assert not can_pack(torch.zeros(64, 64, dtype=torch.float64))
    assert not can_pack(torch.zeros(64, 64, device="meta"))
