"""The row-wise kernels against float64 torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.model.attention.interfaces import PagedKV
from tests.model.kernels.cpu.kernel_cases import (
    DTYPES,
    TOLERANCES,
    every_dtype,
    kernels_of,
    threads,
)

EPS = 1e-5

shapes = {
    "rows": st.integers(1, 70),
    "width": st.sampled_from([1, 4, 15, 16, 17, 31, 32, 64, 100, 768]),
    "dtype": st.sampled_from(DTYPES),
    "count": st.sampled_from([1, 2]),
    "seed": st.integers(0, 9),
}


def random(dtype, *shape):
    """Return numbers of very different sizes."""
    return (torch.randn(*shape) * torch.randn(shape[0], *[1] * (len(shape) - 1)).exp()).to(dtype)


def check(actual, expected, dtype):
    """Compare to a reference of float64, with the tolerance of a dtype."""
    assert actual.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


def rms(x, weight):
    """Normalize in float64."""
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


@settings(max_examples=40, deadline=None)
@given(**shapes)
def test_norms(rows, width, dtype, count, seed):
    """Norms of any width and number of rows equal torch's in float64."""
    torch.manual_seed(seed)
    kernels = kernels_of(dtype)
    x, weight, bias = random(dtype, rows, width), random(dtype, width), random(dtype, width)
    with threads(count):
        check(kernels.rms_norm(x, weight, EPS), rms(x, weight), dtype)
        expected = torch.nn.functional.layer_norm(
            x.double(), (width,), weight.double(), bias.double(), EPS
        )
        check(kernels.layer_norm(x, weight, bias, EPS), expected, dtype)


@settings(max_examples=40, deadline=None)
@given(**shapes)
def test_silu_mul(rows, width, dtype, count, seed):
    """The gated activation equals torch's in float64, far from zero too."""
    torch.manual_seed(seed)
    gate_up = random(dtype, rows, 2 * width) * 20
    with threads(count):
        actual = kernels_of(dtype).silu_mul(gate_up)
    gate, up = gate_up.double().chunk(2, dim=1)
    check(actual, torch.nn.functional.silu(gate) * up, dtype)


@every_dtype
def test_extreme_numbers(dtype):
    """Activations saturate, and what is not a number stays that."""
    gate = torch.tensor([[0.0, 1e4, -1e4, torch.inf, torch.nan, -80.0, 90.0]], dtype=dtype)
    up = torch.ones_like(gate)
    actual = kernels_of(dtype).silu_mul(torch.cat((gate, up), 1))
    torch.testing.assert_close(actual, torch.nn.functional.silu(gate), equal_nan=True)
    x = torch.ones(3, 40, dtype=dtype)
    x[1, 7] = torch.nan
    normed = kernels_of(dtype).rms_norm(x, torch.ones(40, dtype=dtype), EPS)
    assert normed.isnan().all(1).tolist() == [False, True, False]


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 20),
    heads=st.integers(1, 6),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 16, 20, 64, 128]),
    dtype=st.sampled_from(DTYPES),
    count=st.sampled_from([1, 2]),
)
def test_head_norm(tokens, heads, kv_heads, head_dim, dtype, count):
    """Queries and keys are normalized with their rows of weights, values are left alone."""
    torch.manual_seed(tokens)
    qkv = random(dtype, tokens, heads + 2 * kv_heads, head_dim)
    weight = random(dtype, heads + kv_heads, head_dim)
    actual = qkv.clone()
    with threads(count):
        kernels_of(dtype).head_rms_norm_(actual, weight, EPS)
    normed = heads + kv_heads
    check(actual[:, :normed], rms(qkv[:, :normed], weight), dtype)
    assert torch.equal(actual[:, normed:], qkv[:, normed:])


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 20),
    heads=st.integers(1, 6),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 16, 20, 64, 128]),
    block_size=st.sampled_from([1, 4, 16]),
    dtype=st.sampled_from(DTYPES),
    is_rotary=st.booleans(),
    count=st.sampled_from([1, 2]),
)
def test_rotate_and_write(tokens, heads, kv_heads, head_dim, block_size, dtype, is_rotary, count):
    """Pairs are rotated in place; keys and values arrive in their slots and nowhere else."""
    torch.manual_seed(tokens)
    tensor = torch.randn(tokens + 1, 2, 2, block_size, kv_heads, head_dim).to(dtype)
    kv = PagedKV(tensor.clone())
    qkv = random(dtype, tokens, heads + 2 * kv_heads, head_dim)
    blocks, offsets = torch.randperm(tokens + 1)[:tokens], torch.randint(block_size, (tokens,))
    rotations, expected = None, qkv.double()
    if is_rotary:
        angles = torch.randn(tokens, 1, head_dim // 2)
        rotations = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.view_as_complex(
            expected[:, : heads + kv_heads].reshape(tokens, -1, head_dim // 2, 2)
        )
        rotated = torch.view_as_real(pairs * rotations).flatten(-2)
        expected = torch.cat((rotated, expected[:, heads + kv_heads :]), 1)
    with threads(count):
        kernels = kernels_of(dtype)
        kernels.rotate_and_write(qkv, rotations, kv.layers[1], blocks, offsets, heads)
    check(qkv, expected, dtype)
    tensor[blocks, 1, 0, offsets] = qkv[:, heads : heads + kv_heads]
    tensor[blocks, 1, 1, offsets] = qkv[:, heads + kv_heads :]
    assert torch.equal(kv.tensor, tensor)


def test_wrong_tensors_are_refused():
    """A pointer is never taken of a tensor of another dtype or layout."""
    kernels = kernels_of(torch.float32)
    with pytest.raises(ValueError, match="bfloat16"):
        kernels.silu_mul(torch.zeros(2, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="strides"):
        kernels.silu_mul(torch.zeros(8, 2).t())


@every_dtype
def test_rows_do_not_depend_on_neighbours(dtype):
    """A row has the same bits alone and among others, in one thread and in two."""
    torch.manual_seed(0)
    kernels, x, weight = kernels_of(dtype), random(dtype, 33, 200), random(dtype, 200)
    for kernel in (
        lambda rows: kernels.rms_norm(rows, weight, EPS),
        lambda rows: kernels.layer_norm(rows, weight, weight, EPS),
        kernels.silu_mul,
    ):
        alone = torch.cat([kernel(row.unsqueeze(0)) for row in x])
        for count in (1, 2):
            with threads(count):
                assert torch.equal(kernel(x), alone)
                assert torch.equal(kernel(x[5:].contiguous()), alone[5:])
