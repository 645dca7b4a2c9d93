"""The Triton attention against the plain reference, in the interpreter or on the device."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.model.attention import triton as triton_attention
from fastserve.model.attention.interfaces import PagedKV, ReferenceAttention
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.attention.triton import Tiling, TritonAttention
from fastserve.model.staged_batch import stage
from tests import triton_device
from tests.model.attention.test_interfaces import make_batch

DEVICE = triton_device.device()
SMALL = Tiling(decode_positions=16, chunk_positions=16, num_warps=4, num_stages=1)


@pytest.fixture(autouse=True)
def one_thread():
    """One thread for torch: the tensors are tiny."""
    torch.set_num_threads(1)


def to_device(batch):
    """Bring a batch to the device as plain torch would."""
    names = ("token_ids", "positions", "write_blocks", "write_offsets")
    moved = {name: getattr(batch, name).to(DEVICE) for name in names}
    return dataclasses.replace(batch, **moved)


def attend_both(shares, *, kv_heads, group, head_dim, block_size, dtype, seed=0, **settings):
    """Return what the kernels and what the reference compute: (mixed, KV) of each."""
    torch.manual_seed(seed)
    num_blocks = sum(-(-(count + start) // block_size) for count, start in shares) + 1
    tensor = torch.randn(num_blocks, 2, 2, block_size, kv_heads, head_dim, dtype=dtype)
    tensor[-1] = torch.nan  # a block that is nobody's must not be read
    batch = make_batch(shares, block_size, num_blocks - 1, seed)
    for row, context in enumerate(batch.rows.contexts):  # nor a slot that nobody has written
        tensor[
            batch.rows.tables[row, (context - 1) // block_size], :, :, context % block_size :
        ] = torch.nan if context % block_size else 0.0
    heads = kv_heads * group
    qkv = torch.randn(len(batch.token_ids), heads + 2 * kv_heads, head_dim, dtype=dtype)
    angles = torch.randn(len(qkv), 1, head_dim // 2)
    rotations = torch.polar(torch.ones_like(angles), angles) if head_dim % 2 == 0 else None
    shape = AttentionShape.scaled_by_dim(heads, kv_heads, head_dim)
    settings = {"tiling": SMALL, **settings}
    results = []
    for attention, place in (
        (TritonAttention(shape, dtype, **settings), DEVICE),
        (ReferenceAttention(shape), torch.device("cpu")),
    ):
        kv = PagedKV(tensor.clone().to(place))
        mixed = attention.plan(stage(batch, place) if place == DEVICE else batch)(
            qkv.clone().to(place),
            None if rotations is None else rotations.to(place),
            kv.layers[1],
        )
        results.append((mixed.float().cpu(), kv.tensor.float().cpu()))
    return results


@settings(max_examples=8, deadline=None)
@given(
    shares=st.lists(
        st.tuples(st.sampled_from([1, 1, 1, 2, 5, 19, 67]), st.integers(0, 70)),
        min_size=1,
        max_size=5,
    ),
    kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 3, 17]),
    head_dim=st.sampled_from([4, 16, 20, 15]),
    block_size=st.sampled_from([1, 4, 16]),
    processors=st.sampled_from([1, 40]),
    seed=st.integers(0, 99),
)
def test_kernels_equal_reference(shares, kv_heads, group, head_dim, block_size, processors, seed):
    """Decodes, split or not, and chunks at any start give the reference's values and KV."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_attention, "num_processors", lambda device: processors)
        patch.setattr(triton_attention, "MIN_SPLIT_TOKENS", 16)
        (mixed, kv), (expected, expected_kv) = attend_both(
            shares,
            kv_heads=kv_heads,
            group=group,
            head_dim=head_dim,
            block_size=block_size,
            dtype=torch.float32,
            seed=seed,
        )
    torch.testing.assert_close(mixed, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(kv, expected_kv, atol=1e-6, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        (torch.bfloat16, 64),
        (torch.bfloat16, 128),
        (torch.bfloat16, 256),
        (torch.float16, 80),
        (torch.float16, 96),
        (torch.float32, 128),
    ],
    ids=str,
)
def test_dtypes_and_head_dims(dtype, head_dim):
    """Every dtype and the usual head sizes, with the tiles that a device is given."""
    (mixed, kv), (expected, expected_kv) = attend_both(
        [(1, 0), (1, 130), (70, 3)],
        kv_heads=1,
        group=2,
        head_dim=head_dim,
        block_size=16,
        dtype=dtype,
        tiling=None,
    )
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(mixed, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(kv, expected_kv, atol=tolerance, rtol=tolerance, equal_nan=True)


def test_a_plain_batch_is_as_good_as_a_staged_one():
    """An InputBatch that was not staged costs a transfer, and gives the same values."""
    torch.manual_seed(0)
    batch = make_batch([(1, 9), (5, 3)], 4, 8, seed=0)
    tensor = torch.randn(8, 1, 2, 4, 1, 16, device=DEVICE)
    qkv = torch.randn(6, 4, 16, device=DEVICE)
    attention = TritonAttention(AttentionShape.scaled_by_dim(2, 1, 16), torch.float32)
    plain, staged = (
        attention.plan(one)(qkv.clone(), None, PagedKV(tensor.clone()).layers[0])
        for one in (to_device(batch), stage(batch, DEVICE))
    )
    assert torch.equal(plain, staged)


def run_rows(shares, keep, tensor, qkv_by_token, split_tokens):
    """Attend (num_tokens, start, row) shares over fixed tables; returns the tokens of `keep`."""
    attention = TritonAttention(
        AttentionShape.scaled_by_dim(4, 2, 16),
        torch.float32,
        split_tokens=split_tokens,
        tiling=SMALL,
    )
    order = sorted(range(len(shares)), key=lambda i: (shares[i][0] > 1, shares[i][1]))
    chosen = [shares[i] for i in order]
    batch = make_batch([(count, start) for count, start, _ in chosen], 4, 400, seed=0)
    for place, (_, _, row) in enumerate(chosen):
        width = batch.rows.tables.shape[1]
        batch.rows.tables[place] = row * 30 + np.minimum(np.arange(width), 29)
    tokens = [(row, start + i) for count, start, row in chosen for i in range(count)]
    blocks = torch.tensor([row * 30 + position // 4 for row, position in tokens])
    batch = dataclasses.replace(batch, write_blocks=blocks)
    qkv = torch.stack([qkv_by_token[row, position] for row, position in tokens]).to(DEVICE)
    mixed = attention.plan(stage(batch, DEVICE))(qkv, None, PagedKV(tensor.clone()).layers[0])
    return {token: mixed[i].cpu() for i, token in enumerate(tokens) if token in keep}


def test_fixed_splits_are_bit_equal_in_any_company():
    """With fixed splits a token's values do not depend on chunking, batch or place; bit for bit."""
    torch.manual_seed(0)
    tensor = torch.randn(400, 1, 2, 4, 2, 16, device=DEVICE)
    qkv = torch.randn(4, 60, 8, 16)
    for row in range(4):  # the KV of all positions is there already, as those steps wrote it
        for position in range(60):
            block = tensor[row * 30 + position // 4, 0, :, position % 4]
            block[0], block[1] = qkv[row, position, 4:6], qkv[row, position, 6:8]
    keep = {(1, 37), (1, 40)}
    alone = run_rows([(1, 37, 1)], keep, tensor, qkv, 16) | run_rows(
        [(1, 40, 1)], keep, tensor, qkv, 16
    )
    for shares in (
        [(6, 36, 1)],
        [(1, 3, 0), (4, 37, 1), (5, 0, 2)],
        [(1, 55, 0), (1, 37, 1), (1, 50, 2)],
        [(1, 40, 1), (3, 0, 3)],
    ):
        found = run_rows(shares, keep, tensor, qkv, 16)
        assert found
        for token, values in found.items():
            assert torch.equal(values, alone[token])


def test_offsets_beyond_31_bits():
    """A pool of more than 2**31 elements: the last block is found, written and read."""
    num_blocks, block = 2**20 + 8, 2 * 16 * 1 * 64
    assert num_blocks * block > 2**31
    if DEVICE.type == "cpu":  # pages that are never touched take no memory
        storage = np.zeros(num_blocks * block * 2, np.uint8)
        tensor = torch.from_numpy(storage).view(torch.float16).view(num_blocks, 1, 2, 16, 1, 64)
    else:
        tensor = torch.zeros(num_blocks, 1, 2, 16, 1, 64, dtype=torch.float16, device=DEVICE)
    torch.manual_seed(0)
    small = torch.randn(4, 1, 2, 16, 1, 64, dtype=torch.float16)
    last = torch.arange(num_blocks - 4, num_blocks)
    tensor[last.to(DEVICE)] = small.to(DEVICE)
    shape = AttentionShape.scaled_by_dim(2, 1, 64)
    qkv = torch.randn(9, 4, 64, dtype=torch.float16)
    batch = make_batch([(1, 20), (8, 9)], 16, 4, seed=0)
    expected = ReferenceAttention(shape).plan(batch)(qkv.clone(), None, PagedKV(small).layers[0])
    far = dataclasses.replace(
        batch,
        rows=dataclasses.replace(batch.rows, tables=batch.rows.tables + num_blocks - 4),
        write_blocks=batch.write_blocks + num_blocks - 4,
    )
    mixed = TritonAttention(shape, torch.float16).plan(stage(far, DEVICE))(
        qkv.to(DEVICE), None, PagedKV(tensor).layers[0]
    )
    torch.testing.assert_close(mixed.cpu(), expected, atol=4e-3, rtol=4e-3)
    assert torch.equal(tensor[last.to(DEVICE)].cpu(), small)
