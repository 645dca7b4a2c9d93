"""Weights of int8: what is kept of them, and the product against a plain loop over just that."""

from __future__ import annotations

import pytest
import torch

from fastserve.model.ops import int8_linear as module
from fastserve.model.ops.cpu_ops import CpuOps
from fastserve.model.ops.deterministic_ops import DeterministicOps
from fastserve.model.ops.int8_linear import int8_linear, quantize
from fastserve.model.ops.panel_linear import PanelLinear
from fastserve.model.ops.rowwise_ops import RowwiseOps
from fastserve.settings.option import ConfigError
from tests.model.kernels.cpu.kernel_cases import (
    TOLERANCES,
    every_dtype,
    needs_int8,
    own_products,
    threads,
)

SHAPES = [(64, 64), (97, 34), (130, 200), (51, 6), (300, 66), (1, 130)]


def draw(width: int, depth: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight whose rows are of very different sizes."""
    torch.manual_seed(width + depth)
    return (torch.randn(width, depth) * torch.randn(width, 1).exp() / depth**0.5).to(dtype)


@every_dtype
def test_a_number_is_off_by_half_a_step_at_most(dtype):
    """A step is a 127th of the row's largest magnitude, which is met exactly, whatever its sign."""
    weight = draw(130, 200, dtype)
    weight[3] = 0.0
    weight[4] = -weight[4].abs()
    before = weight.clone()
    numbers, scales = quantize(weight)
    assert torch.equal(weight, before)
    assert torch.equal(scales, weight.float().abs().amax(1) / 127)
    steps = scales.double()[:, None]
    assert ((numbers * steps - weight.double()).abs() <= 0.5001 * steps).all()
    peaks = numbers.abs().amax(1).tolist()
    assert peaks.pop(3) == 0
    assert set(peaks) == {127}


def test_pieces_change_nothing(monkeypatch):
    """A weight is widened some rows at a time, the last of which may be fewer."""
    weight = draw(97, 34, torch.bfloat16)
    whole = quantize(weight)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 10 * 34)
    assert all(map(torch.equal, quantize(weight), whole))


def test_what_is_not_finite_stays_so():
    """The outputs of such a row are not finite, and no other's."""
    weight = draw(64, 64, torch.bfloat16)
    weight[1, 2], weight[5, 0] = torch.inf, torch.nan
    y = int8_linear(own_products(torch.bfloat16), weight)(torch.ones(3, 64, dtype=torch.bfloat16))
    assert (~y.isfinite()).nonzero()[:, 1].unique().tolist() == [1, 5]


@every_dtype
@pytest.mark.parametrize(("width", "depth"), SHAPES)
def test_the_product_is_that_of_what_is_kept(dtype, width, depth):
    """For 1 to 100 rows and a few chunks, by itself and added; the bits are a row's own."""
    kernels, tolerance = own_products(dtype), TOLERANCES[dtype]
    weight, bias = draw(width, depth, dtype), torch.randn(width).to(dtype)
    numbers, scales = quantize(weight)
    kept = numbers.double() * scales.double()[:, None]
    x, residual = torch.randn(200, depth).to(dtype), torch.randn(200, width).to(dtype)
    exact = x.double() @ kept.T + bias.double()
    linear = int8_linear(kernels, weight, bias)
    weight.zero_()  # nothing of it is kept
    with threads(1):
        alone = torch.cat([linear(row[None]) for row in x])
        added = [linear.add_to(residual[i : i + 1].clone(), x[i : i + 1]) for i in range(200)]
    stream = torch.cat(added)
    torch.testing.assert_close(alone.double(), exact, rtol=tolerance, atol=tolerance)
    exact += residual.double()
    torch.testing.assert_close(stream.double(), exact, rtol=tolerance, atol=tolerance)
    for count in (1, 3):
        with threads(count):
            for rows in (0, *range(1, 101), 200):
                assert torch.equal(linear(x[:rows]), alone[:rows])
                assert torch.equal(linear.add_to(residual[:rows].clone(), x[:rows]), stream[:rows])


def test_what_is_quantized():
    """Weights of the kernels' dtype, where they are asked for; a router's float32 is left."""
    dtype = torch.bfloat16
    kernels = own_products(dtype)
    ops = DeterministicOps(CpuOps(kernels, RowwiseOps(dtype), has_int8_weights=True))

    def is_int8(weight: torch.Tensor, ops: DeterministicOps = ops) -> bool:
        linear = ops.linear(weight)
        return isinstance(linear, PanelLinear) and linear.panels.scales is not None

    assert is_int8(torch.ones(64, 64, dtype=dtype))
    assert is_int8(torch.ones(3, 64, dtype=dtype))
    assert not is_int8(torch.ones(64, 64))
    plain = DeterministicOps(CpuOps(kernels, RowwiseOps(dtype)))
    assert not is_int8(torch.ones(64, 64, dtype=dtype), plain)


@needs_int8
def test_an_odd_number_of_inputs_is_refused():
    """Whoever asks for int8 has it, or is told: such a weight would stay bfloat16."""
    kernels = own_products(torch.bfloat16)
    ops = CpuOps(kernels, RowwiseOps(torch.bfloat16), has_int8_weights=True)
    with pytest.raises(ConfigError, match=r"--quantization int8: .+ has 33 inputs, "):
        ops.linear(draw(64, 33, torch.bfloat16))
    assert isinstance(ops.linear(draw(33, 64, torch.bfloat16)), PanelLinear)


def test_a_weight_takes_half_the_bytes():
    """One for a number, and four for a channel."""
    kernels, weight = own_products(torch.bfloat16), draw(128, 200, torch.bfloat16)
    panels = int8_linear(kernels, weight).panels
    assert panels.tensor.nbytes == weight.nbytes / 2
    assert panels.scales is not None
    assert panels.scales.nbytes == 4 * 128
