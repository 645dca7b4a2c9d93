"""Triton's norms and gates against the plain layers, in the interpreter or on the device."""

from __future__ import annotations

import pytest
import torch

from fastserve.model.attention.shape import AttentionShape
from fastserve.model.attention.tiled import TiledAttention
from fastserve.model.attention.triton import MAX_HEAD_DIM, TritonAttention
from fastserve.model.ops.cuda_ops import CudaOps
from fastserve.model.ops.rowwise_ops import RowwiseOps
from fastserve.model.ops.torch_ops import TorchOps
from fastserve.model.ops.triton_rowwise import TritonRMSNorm, silu_mul
from tests import triton_device

DEVICE = triton_device.device()
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [5, 64, 300])
def test_rms_norm(dtype, width):
    """Rows of any width are normalized as the plain layer does."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, width).to(dtype), torch.randn(width).to(dtype)
    expected = TorchOps(dtype).rms_norm(weight, 1e-5)(x)
    found = CudaOps(dtype, TorchOps(dtype)).rms_norm(weight.to(DEVICE), 1e-5)(x.to(DEVICE))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.cpu(), expected, atol=tolerance, rtol=tolerance)


def test_rms_norm_of_heads_within_wider_rows():
    """A weight per head applies to a slice of each token's heads, as Qwen3's norms need it."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 7, 16), torch.randn(5, 16)
    expected = TorchOps(torch.float32).rms_norm(weight, 1e-6)(x[:, :5])
    found = TritonRMSNorm(weight.to(DEVICE), 1e-6)(x.to(DEVICE)[:, :5])
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-5)


def test_no_rows_at_all():
    """A step that samples nothing hands on no rows, and no kernel is launched for them."""
    ops, nothing = CudaOps(torch.float32, TorchOps(torch.float32)), torch.ones(0, 8, device=DEVICE)
    assert ops.rms_norm(torch.ones(8, device=DEVICE), 1e-6)(nothing).shape == (0, 8)
    assert silu_mul(nothing).shape == (0, 4)


def test_a_norm_refuses_another_shape():
    """A row that does not fit the weight is an error, not a read beyond its end."""
    with pytest.raises(ValueError, match="a norm over"):
        TritonRMSNorm(torch.ones(8, device=DEVICE), 1e-6)(torch.ones(2, 9, device=DEVICE))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_silu_mul(dtype):
    """silu(gate) · up, over more columns than one program takes."""
    torch.manual_seed(0)
    gate_up = (torch.randn(3, 2 * 1100) * 4).to(dtype)
    gate, up = gate_up.float().chunk(2, dim=1)
    expected = (torch.nn.functional.silu(gate) * up).to(dtype)
    tolerance = TOLERANCE[dtype]
    found = silu_mul(gate_up.to(DEVICE)).cpu()
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_gated_mlp_adds_to_the_stream():
    """The gated MLP of CudaOps adds what the plain one adds."""
    torch.manual_seed(0)
    up, down, x = torch.randn(12, 8), torch.randn(8, 6), torch.randn(3, 8)
    results = []
    for ops, place in (
        (TorchOps(torch.float32), torch.device("cpu")),
        (CudaOps(torch.float32, TorchOps(torch.float32)), DEVICE),
    ):
        mlp = ops.gated_mlp(ops.linear(up.to(place)), ops.linear(down.to(place)))
        residual = torch.ones(3, 8, device=place)
        assert mlp.add_to(residual, x.to(place)) is residual
        results.append(residual.cpu())
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_heads_too_wide_for_the_kernels_are_the_fallbacks():
    """Triton's attention up to its widest head, and beyond it the attention that was handed in."""
    plain = RowwiseOps(torch.float32)
    ops = CudaOps(torch.float32, plain, is_batch_invariant=True)
    widest = AttentionShape.scaled_by_dim(4, 2, MAX_HEAD_DIM)
    assert isinstance(ops.attention(widest), TritonAttention)
    wider = AttentionShape.scaled_by_dim(4, 2, MAX_HEAD_DIM + 2)
    assert isinstance(ops.attention(wider), TiledAttention)
