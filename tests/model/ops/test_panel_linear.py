"""PanelLinear against the plain product, and where oneDNN's memory serves it too."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastserve.model.kernels.cpu.kernel_choice import choose_kernels, own_product_rows
from fastserve.model.kernels.cpu.panels import Panels
from fastserve.model.ops.cpu_ops import CpuOps
from fastserve.model.ops.deterministic_ops import DeterministicOps
from fastserve.model.ops.packed_linear import PackedLinear
from fastserve.model.ops.panel_linear import PanelLinear, find_panels, make_linear, panel_linear
from fastserve.model.ops.rowwise_ops import RowwiseOps
from tests.model.kernels.cpu.kernel_cases import (
    TOLERANCES,
    every_dtype,
    needs_shared_memory,
    own_products,
    threads,
)

SHAPES = [(64, 64), (97, 34), (130, 200), (51, 384), (300, 64)]


def make(rows, width, depth, dtype):
    """Return x, a weight and a bias."""
    torch.manual_seed(rows * 31 + width)
    x, weight, bias = torch.randn(rows, depth), torch.randn(width, depth), torch.randn(width)
    return x.to(dtype), (weight / depth**0.5).to(dtype), bias.to(dtype)


@every_dtype
@pytest.mark.parametrize(("width", "depth"), SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_product_is_the_plain_one(dtype, width, depth, has_bias):
    """For any number of rows and threads, by itself and added to the stream; rows by themselves."""
    kernels, tolerance = own_products(dtype), TOLERANCES[dtype]
    for rows in (0, 1, 2, 7, 8, 97, 200):
        x, weight, some_bias = make(rows, width, depth, dtype)
        bias = some_bias if has_bias else None
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        linear = panel_linear(kernels, weight, bias)
        alone = torch.cat([x.new_empty(0, width), *(linear(row[None]) for row in x)])
        residual = torch.randn(rows, width).to(dtype)
        for count in (1, 3):
            with threads(count):
                y = linear(x)
                stream = residual.clone()
                assert linear.add_to(stream, x) is stream
            assert torch.equal(y, alone)
            torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)
            exact_sum = exact + residual.double()
            torch.testing.assert_close(stream.double(), exact_sum, rtol=tolerance, atol=tolerance)


def test_more_threads_share_out_a_panel():
    """A narrow weight is cut finer for more threads, never finer than a vector."""
    panels = Panels(torch.empty(0), 0, None, 384, 64, 64 * 64)
    assert [panels.columns(threads) for threads in (1, 2, 4, 6, 64)] == [64, 32, 16, 16, 16]


def test_what_has_no_kernel():
    """Narrow weights, another dtype, half a lane, and wherever products are left to oneDNN."""
    own = own_products(torch.bfloat16)
    odd = 33 if own.per_lane == 2 else 31
    weights = [torch.zeros(shape, dtype=own.dtype) for shape in ((31, 64), (64, 31), (64, odd))]
    assert [make_linear(own, weight, None) for weight in (*weights, torch.zeros(64, 64))] == [
        None
    ] * 4
    assert make_linear(own, torch.zeros(64, 64, dtype=own.dtype), None) is not None
    none = choose_kernels("native", torch.float32, max_rows=0)
    assert none is not None
    assert make_linear(none, torch.zeros(64, 64), None) is None


def test_the_processor_decides(monkeypatch):
    """Without tiles of ours. Pairs: any rows, with AMX up to a tile's; single numbers nowhere."""
    for per_lane, has_amx, expected in ((2, 0, math.inf), (2, 1, 16), (1, 0, 0), (1, 1, 0)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has_amx: bool(has))
        assert own_product_rows(per_lane) == expected


def test_a_row_by_itself_needs_no_tiles():
    """`--deterministic` takes our projection as it is."""
    dtype = torch.bfloat16
    kernels = choose_kernels("native", dtype, max_rows=math.inf, is_rowwise=True)
    assert kernels is not None
    assert kernels.is_rowwise
    ops = DeterministicOps(CpuOps(kernels, RowwiseOps(dtype)))
    assert isinstance(ops.linear(torch.zeros(64, 64, dtype=dtype)), PanelLinear)


@needs_shared_memory
@pytest.mark.parametrize(("width", "depth"), SHAPES)
def test_one_memory_serves_both(width, depth):
    """Few rows by our kernel, more by oneDNN, from the weight as oneDNN has laid it out."""
    kernels = choose_kernels("native", torch.bfloat16, max_rows=4)
    assert kernels is not None
    _, weight, bias = make(1, width, depth, torch.bfloat16)
    linear = make_linear(kernels, weight, bias)
    assert isinstance(linear, PanelLinear)
    assert not linear.is_rowwise
    assert linear.packed is not None
    assert linear.panels.tensor is linear.packed.packed
    weight_before, own = weight.clone(), panel_linear(own_products(torch.bfloat16), weight, bias)
    weight.zero_()  # nothing of it is kept
    for rows in (1, 4, 5, 40):
        x, *_ = make(rows, width, depth, torch.bfloat16)
        residual = torch.randn(rows, width).to(torch.bfloat16)
        exact = F.linear(x.double(), weight_before.double(), bias.double())
        torch.testing.assert_close(linear(x).double(), exact, rtol=2e-2, atol=2e-2)
        if rows <= 4:
            assert torch.equal(linear(x), own(x))
        stream = linear.add_to(residual.clone(), x).double()
        torch.testing.assert_close(stream, exact + residual.double(), rtol=2e-2, atol=2e-2)


@needs_shared_memory
def test_another_layout_is_found_out():
    """Memory that does not hold the panels is not read as if it did."""
    _, weight, _ = make(1, 128, 64, torch.bfloat16)
    packed = PackedLinear(weight)
    assert find_panels(packed, weight, 2) is not None
    assert find_panels(packed, weight.flip(0), 2) is None
    assert find_panels(packed, weight, 1) is None
