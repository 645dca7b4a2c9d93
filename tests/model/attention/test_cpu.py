"""CpuAttention against the definition in float64, and that a token's bits are its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.model.attention.cpu import CpuAttention
from fastserve.model.attention.interfaces import PagedKV
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.input_batch import build_input_batch
from tests.model.attention.test_interfaces import CPU, make_batch, shares_strategy
from tests.model.kernels.cpu.kernel_cases import (
    DTYPES,
    TOLERANCES,
    every_dtype,
    kernels_of,
    threads,
)


def reference(qkv, layer, batch, heads):
    """Return softmax(q Kᵀ / √d) V of every token, in float64."""
    rows, kv_heads = batch.rows, (qkv.shape[1] - heads) // 2
    out = []
    tables = np.repeat(rows.tables, rows.counts, axis=0)
    for token, table, position in zip(qkv, tables, batch.positions.tolist(), strict=True):
        block_size = layer.both.shape[2]
        used = layer.both[torch.from_numpy(table[: position // block_size + 1])].double()
        shape = (-1, kv_heads, qkv.shape[2])
        keys = used[:, 0].reshape(shape)[: position + 1].repeat_interleave(heads // kv_heads, 1)
        values = used[:, 1].reshape(shape)[: position + 1].repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("hd,chd->hc", token[:heads].double(), keys)
        weights = (scores / math.sqrt(qkv.shape[2])).softmax(-1)
        out.append(torch.einsum("hc,chd->hd", weights, values).flatten())
    return torch.stack(out)


@settings(max_examples=60, deadline=None)
@given(
    shares=shares_strategy,
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3, 4, 8]),
    head_dim=st.sampled_from([4, 16, 20, 32, 64, 80, 128]),
    block_size=st.sampled_from([1, 4, 16]),
    dtype=st.sampled_from(DTYPES),
    count=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_equals_the_definition(shares, kv_heads, group, head_dim, block_size, dtype, count, seed):
    """Decodes and chunks of any shape give the definition's values and read no other slot."""
    torch.manual_seed(seed)
    num_blocks = sum(-(-(count + start) // block_size) for count, start in shares) + 1
    tensor = torch.randn(num_blocks, 2, 2, block_size, kv_heads, head_dim).to(dtype)
    batch = make_batch(shares, block_size, num_blocks - 1, seed)
    rows = batch.rows
    tensor[-1] = torch.nan  # the block that pads tables is nobody's
    last_blocks = rows.tables[np.arange(len(rows.starts)), rows.num_blocks - 1]
    for block, context in zip(last_blocks, rows.contexts, strict=True):
        tensor[block, :, :, (context - 1) % block_size + 1 :] = torch.nan  # slots not yet written
    heads = kv_heads * group
    kv = PagedKV(tensor)
    qkv = torch.randn(len(batch.token_ids), heads + 2 * kv_heads, head_dim).to(dtype)
    attention = CpuAttention(
        kernels_of(dtype), AttentionShape.scaled_by_dim(heads, kv_heads, head_dim)
    )
    with threads(count):
        actual = attention.plan(batch)(qkv, None, kv.layers[1])
    expected = reference(qkv, kv.layers[1], batch, heads)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


def run_shares(attention, tensor, qkv, table, shares):
    """Attend the tokens `shares` [(start, count)] of one sequence whose KV is all written."""
    starts, counts = (np.array(part) for part in zip(*shares, strict=True))
    order = np.lexsort((starts, counts > 1))
    starts, counts = starts[order], counts[order]
    ids = np.concatenate([np.arange(s, s + c) for s, c in zip(starts, counts, strict=True)])
    batch = build_input_batch(
        token_ids=ids,
        starts=starts,
        counts=counts,
        tables=np.repeat(table[None], len(starts), axis=0),
        scored=None,
        block_size=16,
        device=CPU,
    )
    out = attention.plan(batch)(qkv[ids], None, PagedKV(tensor).layers[0])
    return dict(zip(ids.tolist(), out, strict=True))


@every_dtype
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (3, 3), (5, 1)])
def test_bits_of_a_token_are_its_own(heads, kv_heads, dtype):
    """Batch, row, chunking and threads leave a token's bits alone, of few queries as of many."""
    torch.manual_seed(0)
    dim, length = 64, 200
    qkv = torch.randn(length, heads + 2 * kv_heads, dim).to(dtype)
    table = np.random.default_rng(0).permutation(13)
    tensor = torch.full((13, 1, 2, 16, kv_heads, dim), torch.nan, dtype=dtype)
    attention = CpuAttention(kernels_of(dtype), AttentionShape.scaled_by_dim(heads, kv_heads, dim))
    with threads(1):
        whole = run_shares(attention, tensor, qkv, table, [(0, length)])
        for size in (1, 7, 64):
            for start in range(0, length, size):
                count = min(size, length - start)
                part = run_shares(attention, tensor, qkv, table, [(start, count)])
                assert all(torch.equal(out, whole[token]) for token, out in part.items())
    for count in (1, 2):
        with threads(count):
            for shares in (
                [(start, 1) for start in range(length)],
                [(start, 1) for start in range(100, 103)],
                [(5, 1), (199, 1), (32, 31), (64, 100)],
            ):
                part = run_shares(attention, tensor, qkv, table, shares)
                assert len(part) == sum(count for _, count in shares)
                assert all(torch.equal(out, whole[token]) for token, out in part.items())


@every_dtype
@pytest.mark.parametrize("length", [1, 40])
def test_what_is_no_number_shows(length, dtype):
    """A key that is none makes the result of every token that sees it none, and of no other."""
    torch.manual_seed(0)
    heads, dim, poisoned = 2, 64, 30
    tensor = torch.randn(4, 1, 2, 16, heads, dim).to(dtype)
    qkv = torch.randn(48, 3 * heads, dim).to(dtype)
    qkv[poisoned, heads : 2 * heads] = torch.nan
    attention = CpuAttention(kernels_of(dtype), AttentionShape.scaled_by_dim(heads, heads, dim))
    shares = [(start, min(length, 48 - start)) for start in range(0, 48, length)]
    for start, count in shares:
        part = run_shares(attention, tensor, qkv, np.arange(4), [(start, count)])
        for token, out in part.items():
            assert bool(out.isnan().all()) == bool(out.isnan().any()) == (token >= poisoned)
