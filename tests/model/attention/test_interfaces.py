"""The fast attention path against the plain reference, on random shapes and tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.model.attention import gathered as gathered_attention
from fastserve.model.attention.gathered import GatheredAttention, split_groups
from fastserve.model.attention.interfaces import PagedKV, ReferenceAttention
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.input_batch import build_input_batch, order_rows

CPU = torch.device("cpu")


def make_batch(shares, block_size, num_blocks, seed):
    """Build the batch of (num_tokens, start) shares over randomly placed blocks."""
    starts = np.array([start for _, start in shares])
    counts = np.array([count for count, _ in shares])
    order = order_rows(starts, counts)
    starts, counts = starts[order], counts[order]
    used = -(-(starts + counts) // block_size)
    blocks = iter(np.random.default_rng(seed).permutation(num_blocks))
    tables = np.full((len(shares), int(used.max())), num_blocks - 1)
    for row, count in enumerate(used):
        tables[row, :count] = [next(blocks) for _ in range(count)]
    return build_input_batch(
        token_ids=np.zeros(int(counts.sum()), np.int64),
        starts=starts,
        counts=counts,
        tables=tables,
        scored=None,
        block_size=block_size,
        device=CPU,
    )


shares_strategy = st.lists(
    st.tuples(st.sampled_from([1, 1, 1, 2, 5, 19]), st.integers(0, 70)), min_size=1, max_size=9
)


@settings(max_examples=60, deadline=None)
@given(
    shares=shares_strategy,
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([4, 16, 20]),
    block_size=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 99),
)
def test_fast_equals_reference(shares, kv_heads, group, head_dim, block_size, seed):
    """Decodes, first chunks and later chunks in one batch give the reference's values and KV."""
    torch.manual_seed(seed)
    num_blocks = sum(-(-(count + start) // block_size) for count, start in shares) + 1
    tensor = torch.randn(num_blocks, 2, 2, block_size, kv_heads, head_dim)
    tensor[-1] = torch.nan  # padding must not read a block that is nobody's
    copies = [PagedKV(tensor.clone()) for _ in range(2)]
    batch = make_batch(shares, block_size, num_blocks - 1, seed)
    heads = kv_heads * group
    qkv = torch.randn(len(batch.token_ids), heads + 2 * kv_heads, head_dim)
    shape = AttentionShape.scaled_by_dim(heads, kv_heads, head_dim)
    fast = GatheredAttention(shape, torch.float32).plan(batch)(
        qkv.clone(), None, copies[0].layers[1]
    )
    reference = ReferenceAttention(shape).plan(batch)(qkv.clone(), None, copies[1].layers[1])
    torch.testing.assert_close(fast, reference, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(copies[0].tensor, copies[1].tensor, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(copies[0].tensor[:-1, 0], tensor[:-1, 0])  # the other layer is untouched


def test_groups_cover_every_row_and_waste_little():
    """Groups partition the rows, split where padding is costly, and respect the cache's size."""
    contexts = np.sort(np.random.default_rng(0).integers(1, 3000, 64))
    runs = split_groups(contexts, None)
    assert [row for start, stop in runs for row in range(start, stop)] == list(range(64))
    padded = sum((stop - start) * contexts[stop - 1] for start, stop in runs)
    assert padded < 1.3 * contexts.sum()
    assert split_groups(np.full(64, 100), None) == [(0, 64)]
    assert all(stop - start <= 5 for start, stop in split_groups(np.full(64, 100), 512))
    assert split_groups(np.array([9000, 9000]), 512) == [(0, 1), (1, 2)]
    assert split_groups(np.array([], np.int64), 512) == []


@pytest.mark.parametrize("limit", [2**6, 2**30])
def test_grouping_does_not_change_values(limit, monkeypatch):
    """However decodes are grouped, they attend to the same tokens."""
    monkeypatch.setattr(gathered_attention, "GROUP_BYTES", limit)
    torch.manual_seed(0)
    kv = PagedKV(torch.randn(40, 1, 2, 4, 2, 8))
    batch = make_batch([(1, start) for start in (0, 3, 3, 9, 40, 41)], 4, 40, seed=1)
    qkv = torch.randn(6, 8, 8)
    shape = AttentionShape.scaled_by_dim(4, 2, 8)
    torch.testing.assert_close(
        GatheredAttention(shape, torch.float32).plan(batch)(qkv, None, kv.layers[0]),
        ReferenceAttention(shape).plan(batch)(qkv, None, kv.layers[0]),
    )
