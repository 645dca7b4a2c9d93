"""Tests for fastserve.model.ops.cpu_ops: each part against the plain one."""

from __future__ import annotations

import pytest
import torch

from fastserve.model.attention.cpu import CpuAttention
from fastserve.model.attention.gathered import GatheredAttention
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.kernels.cpu.kernel_choice import choose_kernels
from fastserve.model.kernels.cpu.onednn import can_pack
from fastserve.model.ops.cpu_ops import CpuOps
from fastserve.model.ops.cpu_parts import (
    FusedGatedMLP,
    FusedHeadNorm,
    FusedLayerNorm,
    FusedRMSNorm,
)
from fastserve.model.ops.layers import GatedMLP, LayerNorm, RMSNorm
from fastserve.model.ops.packed_linear import PackedLinear
from fastserve.model.ops.torch_ops import TorchOps

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype that has kernels."""
    chosen: torch.dtype = request.param
    return chosen


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return random numbers, the same ones at every call with this shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@torch.inference_mode()
def test_norms_are_the_plain_ones(dtype: torch.dtype) -> None:
    """RMS and layer norm over rows, fused where there is a kernel for them."""
    ops, plain = CpuOps(choose_kernels("auto", dtype), TorchOps(dtype)), TorchOps(dtype)
    x, weight, bias = (random(*shape, dtype=dtype) for shape in ((9, 48), (48,), (48,)))
    pairs = [
        (ops.rms_norm(weight, 1e-5), plain.rms_norm(weight, 1e-5), FusedRMSNorm),
        (ops.layer_norm(weight, bias, 1e-5), plain.layer_norm(weight, bias, 1e-5), FusedLayerNorm),
        (ops.layer_norm(None, None, 1e-5), plain.layer_norm(None, None, 1e-5), LayerNorm),
    ]
    for part, expected, kind in pairs:
        assert type(part) is kind
        torch.testing.assert_close(
            part(x), expected(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


@torch.inference_mode()
def test_a_norm_of_heads_has_a_weight_for_each(dtype: torch.dtype) -> None:
    """Qwen3's query and key norms: in place, a weight row for each head, values as they were."""
    weight, qkv = random(3, 16, dtype=dtype), random(5, 6, 16, dtype=dtype)
    fused = CpuOps(choose_kernels("auto", dtype), TorchOps(dtype)).head_rms_norm(weight, 1e-5)
    assert type(fused) is FusedHeadNorm
    norms = [
        ops.head_rms_norm(weight, 1e-5) for ops in (TorchOps(dtype), CpuOps(None, TorchOps(dtype)))
    ]
    normed = torch.cat([TorchOps(dtype).rms_norm(weight, 1e-5)(qkv[:, :3]), qkv[:, 3:]], 1)
    for norm in (fused, *norms):
        found = qkv.clone()
        norm(found)
        torch.testing.assert_close(found, normed)


@torch.inference_mode()
def test_the_gated_mlp_is_the_plain_one(dtype: torch.dtype) -> None:
    """Added to the stream in place."""
    gate_up, down = random(256, 64, dtype=dtype) / 8, random(64, 128, dtype=dtype) / 11
    x, residual = random(7, 64, dtype=dtype), random(7, 64, dtype=dtype)
    results = []
    for ops in (CpuOps(choose_kernels("auto", dtype), TorchOps(dtype)), TorchOps(dtype)):
        mlp = ops.gated_mlp(ops.linear(gate_up), ops.linear(down))
        stream = residual.clone()
        assert mlp.add_to(stream, x) is stream
        results.append(stream)
    torch.testing.assert_close(*results, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_without_kernels_only_products_differ() -> None:
    """Half precision has no kernels; nor has plain torch, when it is asked for."""
    assert choose_kernels("auto", torch.float16) is None
    ops = CpuOps(choose_kernels("torch", torch.float32), TorchOps(torch.float32))
    linear = ops.linear(torch.zeros(64, 64))
    assert isinstance(linear, PackedLinear) or not can_pack(torch.zeros(64, 64))
    assert isinstance(ops.rms_norm(torch.zeros(64), 1e-5), RMSNorm)
    assert isinstance(ops.gated_mlp(linear, linear), GatedMLP)
    attention = ops.attention(AttentionShape.scaled_by_dim(4, 2, 16))
    assert isinstance(attention, GatheredAttention)


def test_with_kernels_parts_are_fused(dtype: torch.dtype) -> None:
    """Attention and the MLP use them."""
    ops = CpuOps(choose_kernels("auto", dtype), TorchOps(dtype))
    linear = ops.linear(torch.zeros(64, 64, dtype=dtype))
    assert isinstance(ops.gated_mlp(linear, linear), FusedGatedMLP)
    attention = ops.attention(AttentionShape.scaled_by_dim(4, 2, 16))
    assert isinstance(attention, CpuAttention)
