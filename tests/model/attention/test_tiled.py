"""Plain tiled attention against the definition, and a token's bits alone and in a chunk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.model.attention.interfaces import PagedKV, ReferenceAttention
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.attention.tiled import TiledAttention
from tests.model.attention.test_interfaces import make_batch

CONTEXT = 150
BLOCK_SIZE = 4


def run(attention, shares, qkv, tensor, rotations=None, seed=0):
    """Attend in one layer over a copy of some KV; returns mixed values and the KV."""
    kv = PagedKV(tensor.clone())
    batch = make_batch(shares, tensor.shape[3], len(tensor) - 1, seed)
    return attention.plan(batch)(qkv.clone(), rotations, kv.layers[0]), kv.tensor


@settings(max_examples=25, deadline=None)
@given(
    shares=st.lists(
        st.tuples(st.sampled_from([1, 1, 2, 19]), st.integers(0, 140)), min_size=1, max_size=20
    ),
    kv_heads=st.sampled_from([1, 3]),
    group=st.sampled_from([1, 4]),
    block_size=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 99),
)
def test_it_equals_the_reference(shares, kv_heads, group, block_size, seed):
    """Any mix of tokens and chunks, rotated: the reference's values and KV, nothing unwritten."""
    torch.manual_seed(seed)
    num_blocks = sum(-(-(count + start) // block_size) for count, start in shares) + 1
    tensor = torch.randn(num_blocks, 1, 2, block_size, kv_heads, 8)
    tensor[-1] = torch.nan
    num_tokens = sum(count for count, _ in shares)
    qkv = torch.randn(num_tokens, kv_heads * (group + 2), 8)
    rotations = torch.polar(torch.ones(num_tokens, 1, 4), torch.randn(num_tokens, 1, 4))
    shape = AttentionShape.scaled_by_dim(kv_heads * group, kv_heads, 8)
    mixed, kv = run(TiledAttention(shape), shares, qkv, tensor, rotations, seed)
    expected, expected_kv = run(ReferenceAttention(shape), shares, qkv, tensor, rotations, seed)
    torch.testing.assert_close(mixed, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(kv, expected_kv, equal_nan=True)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_its_bits_alone_and_in_a_chunk(dtype, num_threads):
    """The last tokens of a sequence, computed one by one, equal those of one long chunk."""
    torch.manual_seed(0)
    attention = TiledAttention(AttentionShape.scaled_by_dim(6, 2, 16))
    tensor = torch.full((60, 1, 2, BLOCK_SIZE, 2, 16), torch.nan, dtype=dtype)
    qkv = torch.randn(CONTEXT, 10, 16).to(dtype)
    rotations = torch.polar(torch.ones(CONTEXT, 1, 8), torch.randn(CONTEXT, 1, 8))
    torch.set_num_threads(num_threads)
    try:
        whole, kv = run(attention, [(CONTEXT, 0)], qkv, tensor, rotations)
        start = CONTEXT - 20
        _, partial = run(attention, [(start, 0)], qkv[:start], tensor, rotations[:start])
        for position in range(start, CONTEXT):
            own = slice(position, position + 1)
            alone, partial = run(attention, [(1, position)], qkv[own], partial, rotations[own])
            assert torch.equal(alone, whole[own])
        torch.testing.assert_close(partial, kv, atol=0, rtol=0, equal_nan=True)
    finally:
        torch.set_num_threads(1)
