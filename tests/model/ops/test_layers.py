"""Norms, activations and rotations against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastserve.model.attention.rotary import Rotary
from fastserve.model.ops.layers import LayerNorm, RMSNorm, activate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype):
    """Both ways of normalizing equal the definition."""
    x = torch.randn(5, 32).to(dtype) * 3
    norm = RMSNorm(torch.rand(32).to(dtype), 1e-3)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(norm(x).double(), expected, atol=tolerance, rtol=tolerance)


def test_rotation_in_half_precision():
    """Half types rotate through float32: the result is the rounded exact one."""
    heads = torch.randn(4, 3, 8)
    rotations = torch.polar(torch.ones(4, 1, 4), torch.randn(4, 1, 4))
    half = heads.to(torch.bfloat16)
    exact = half.float().clone()
    Rotary.rotate_(exact, rotations)
    Rotary.rotate_(half, rotations)
    torch.testing.assert_close(half, exact.to(torch.bfloat16))
    assert not torch.allclose(exact, heads, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_affine", [True, False])
def test_layer_norm(dtype, is_affine):
    """The norm equals the definition, computed in float64, with and without weight and bias."""
    x = (torch.randn(5, 32) * 3 + 1).to(dtype)
    weight, bias = torch.rand(2, 32).to(dtype) if is_affine else (None, None)
    wide = x.double()
    centered = wide - wide.mean(-1, keepdim=True)
    expected = centered / (centered.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    if weight is not None and bias is not None:
        expected = expected * weight.double() + bias.double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    result = LayerNorm(weight, bias, 1e-3)(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)


def test_activations():
    """Each name is its function; the tanh kind of gelu is not the exact one."""
    x = torch.linspace(-4, 4, 101)
    assert torch.equal(activate(x.clone(), "relu"), x.clamp(min=0))
    assert torch.equal(activate(x.clone(), "silu"), F.silu(x))
    exact, tanh = activate(x.clone(), "gelu"), activate(x.clone(), "gelu_tanh")
    torch.testing.assert_close(exact, x * 0.5 * (1 + torch.erf(x / 2**0.5)))
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    torch.testing.assert_close(tanh, 0.5 * x * (1 + inner.tanh()))
    assert not torch.allclose(exact, tanh, atol=1e-5)
