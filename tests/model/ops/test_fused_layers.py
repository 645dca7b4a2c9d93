"""FusedLayers: the bits of the same layers called part by part, for every step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.model.attention.interfaces import PagedKV
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.decoder_parts import PreNormLayer
from fastserve.model.kernels.cpu.kernel_choice import choose_kernels
from fastserve.model.ops.cpu_ops import CpuOps
from fastserve.model.ops.fused_layers import FusedLayers
from fastserve.model.ops.layer_loop import LayerLoop
from fastserve.model.ops.torch_ops import TorchOps
from tests.model.attention.test_interfaces import make_batch, shares_strategy
from tests.model.kernels.cpu.kernel_cases import DTYPES, needs_shared_memory, threads

HIDDEN, INNER, HEAD_DIM, HEADS, KV_HEADS = 96, 160, 16, 6, 2
BLOCK_SIZE = 4


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Return weights that keep the size of what they are multiplied with."""
    return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)


def make_layers(
    dtype,
    num_layers,
    *,
    has_bias=False,
    has_head_norm=False,
    has_int8_weights=False,
    num_own=9,
    max_rows=math.inf,
):
    """Make layers of the parts of a CPU; those from `num_own` on have a norm of plain torch."""
    kernels = choose_kernels("native", dtype, max_rows=max_rows)
    plain = TorchOps(dtype)
    ops = CpuOps(kernels, plain, has_int8_weights=has_int8_weights)
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM

    def linear(out_width, in_width):
        bias = random(out_width, dtype=dtype) if has_bias else None
        return ops.linear(random(out_width, in_width, dtype=dtype), bias)

    layers = [
        PreNormLayer(
            attention_norm=ops.rms_norm(torch.rand(HIDDEN).to(dtype), 1e-5),
            qkv=linear(width, HIDDEN),
            output=linear(HIDDEN, HEADS * HEAD_DIM),
            mlp_norm=(ops if index < num_own else plain).rms_norm(
                torch.rand(HIDDEN).to(dtype), 1e-6
            ),
            mlp=ops.gated_mlp(linear(2 * INNER, HIDDEN), linear(HIDDEN, INNER)),
            head_dim=HEAD_DIM,
            head_norm=ops.head_rms_norm(torch.rand(HEADS + KV_HEADS, HEAD_DIM).to(dtype), 1e-5)
            if has_head_norm
            else None,
        )
        for index in range(num_layers)
    ]
    shape = AttentionShape.scaled_by_dim(HEADS, KV_HEADS, HEAD_DIM)
    return ops.layers(layers, ops.attention(shape))


@settings(max_examples=40, deadline=None)
@given(
    shares=shares_strategy,
    dtype=st.sampled_from(DTYPES),
    num_layers=st.integers(1, 3),
    has_bias=st.booleans(),
    has_head_norm=st.booleans(),
    has_int8_weights=st.booleans(),
    share_scored=st.sampled_from([None, 0.0, 0.3, 1.0, 2.5]),
    count=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
)
def test_the_bits_are_those_of_the_loop(
    shares,
    dtype,
    num_layers,
    has_bias,
    has_head_norm,
    has_int8_weights,
    share_scored,
    count,
    seed,
):
    """Decodes and chunks; rows wanted in any order, not at all, or several times: stream and KV."""
    torch.manual_seed(seed)
    num_blocks = sum(-(-(count + start) // BLOCK_SIZE) for count, start in shares) + 1
    batch = make_batch(shares, BLOCK_SIZE, num_blocks, seed)
    num_tokens = len(batch.token_ids)
    tensor = torch.randn(num_blocks, num_layers, 2, BLOCK_SIZE, KV_HEADS, HEAD_DIM).to(dtype)
    layers = make_layers(
        dtype,
        num_layers,
        has_bias=has_bias,
        has_head_norm=has_head_norm,
        has_int8_weights=has_int8_weights,
    )
    assert isinstance(layers, FusedLayers)
    hidden = torch.randn(num_tokens, HIDDEN).to(dtype)
    angles = torch.randn(num_tokens, 1, HEAD_DIM // 2)
    rotations = torch.polar(torch.ones_like(angles), angles)
    scored = None
    if share_scored is not None:
        scored = torch.randint(num_tokens, (round(num_tokens * share_scored),))
    found = []
    for run in (layers, layers.loop):
        kv = PagedKV(tensor.clone())
        with threads(count), torch.inference_mode():
            found.append((run(hidden.clone(), rotations, batch, kv, scored), kv.tensor))
    (fused, fused_kv), (plain, plain_kv) = found
    assert fused.isfinite().all()
    assert torch.equal(fused, plain)
    assert torch.equal(fused_kv, plain_kv)


def test_other_parts_are_called_one_by_one():
    """One layer with a part of plain torch, or an attention that is not fused, and none is."""
    dtype = torch.float32
    assert isinstance(make_layers(dtype, 3), FusedLayers)
    assert isinstance(make_layers(dtype, 3, num_own=2), LayerLoop)
    ops = CpuOps(None, TorchOps(dtype))
    assert isinstance(ops.layers([], ops.attention(AttentionShape(1, 1, 16, 1.0))), LayerLoop)


@needs_shared_memory
@pytest.mark.parametrize("num_tokens", [3, 4])
def test_more_rows_than_our_products_take_run_in_the_loop(num_tokens):
    """As with AMX: few rows in one call, more part by part and by oneDNN, from the same weights."""
    dtype = torch.bfloat16
    layers, calls = make_layers(dtype, 2, max_rows=3), []
    assert isinstance(layers, FusedLayers)
    plain = layers.loop

    def loop(hidden, *rest):
        calls.append(len(hidden))
        return plain(hidden, *rest)

    layers.loop = loop
    batch = make_batch([(num_tokens, 0)], BLOCK_SIZE, 9, 0)
    hidden, found = torch.randn(num_tokens, HIDDEN).to(dtype), []
    for run in (layers, plain):
        kv = PagedKV(torch.zeros(9, 2, 2, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype))
        with torch.inference_mode():
            found.append(run(hidden.clone(), None, batch, kv, None))
    assert torch.equal(*found)
    assert calls == ([4] if num_tokens == 4 else [])
