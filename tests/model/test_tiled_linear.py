"""Tiles of proven heights: which heights are trusted, and how rows are covered by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastserve.model import tiled_linear
from fastserve.model.layers import Linear
from fastserve.model.tiled_linear import HEIGHTS, TiledLinear, agreeing_heights, cut_rows

CPU = torch.device("cpu")
SHAPE: Any = {"in_width": 40, "out_width": 24, "dtype": torch.float32, "device": CPU}


def exact(x):
    """Multiply so that a row's bits depend on nothing else: one row at a time."""
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(3))
    return torch.cat([row[None] @ weight.T for row in x])


def test_heights_that_add_up_differently_are_not_used():
    """A product that sums one or two rows in another order loses these heights only."""

    def product(x):
        return exact(x) if len(x) > 2 else exact(x) * (1 + 2**-20)

    assert agreeing_heights(product, **SHAPE) == HEIGHTS[:-2]


def test_heights_whose_rows_are_treated_differently_are_not_used():
    """A product that treats rows from 100 on in another way loses the heights that have these."""

    def product(x):
        y = exact(x)
        y[100:] *= 1 + 2**-20
        return y

    assert agreeing_heights(product, **SHAPE) == tuple(h for h in HEIGHTS if h <= 64)


def test_the_last_row_counts_too():
    """A product that treats the last row of any tile differently leaves single rows only."""

    def product(x):
        y = exact(x)
        if len(x) > 1:
            y[-1] *= 1 + 2**-20
        return y

    assert agreeing_heights(product, **SHAPE) == (1,)


def test_a_product_that_is_never_the_same_is_refused():
    """Where not even one row alone is reproducible, there is nothing to build on."""
    with pytest.raises(RuntimeError, match="not reproducible"):
        agreeing_heights(lambda x: torch.rand(len(x), 24), **SHAPE)


def test_wide_results_have_short_tiles(monkeypatch):
    """The result of a tile stays within its memory."""
    monkeypatch.setattr(tiled_linear, "MAX_TILE_ELEMENTS", 24 * 20)
    assert agreeing_heights(exact, **SHAPE) == tuple(h for h in HEIGHTS if h <= 16)


@pytest.mark.parametrize("heights", [HEIGHTS, HEIGHTS[:-1], (16,), (1,), (256, 4)])
def test_cuts_cover_every_row_once(heights):
    """Tiles follow each other, have proven heights, and only the last one is padded."""
    for num_rows in (1, 2, 3, 5, 31, 32, 33, 64, 65, 100, 511, 512, 513, 1300):
        cuts = cut_rows(num_rows, heights)
        assert [start for start, _, _ in cuts] == [0, *(stop for _, stop, _ in cuts[:-1])]
        assert cuts[-1][1] == num_rows
        assert all(height in heights for _, _, height in cuts)
        assert all(stop - start == height for start, stop, height in cuts[:-1])
        assert cuts[-1][1] - cuts[-1][0] <= cuts[-1][2]


def test_few_rows_are_one_tile_and_many_are_little_padded():
    """A decode reads the weight once; a prefill computes little that nobody asked for."""
    assert cut_rows(17, HEIGHTS) == [(0, 17, 32)]
    assert cut_rows(512, HEIGHTS) == [(0, 512, 512)]
    assert cut_rows(130, HEIGHTS) == [(0, 128, 128), (128, 130, 2)]
    for num_rows in range(33, 600):
        assert sum(height for *_, height in cut_rows(num_rows, HEIGHTS)) < 1.34 * num_rows


@pytest.mark.parametrize("num_rows", [0, 1, 5, 40, 700])
def test_tiles_give_the_projection(num_rows):
    """With a bias or added to a residual: the rows of the plain projection."""
    torch.manual_seed(0)
    inner = Linear(torch.randn(24, 40), torch.randn(24))
    tiled = TiledLinear(inner, (64, 4))
    x, residual = torch.randn(num_rows, 40), torch.randn(num_rows, 24)
    torch.testing.assert_close(tiled(x), inner(x))
    torch.testing.assert_close(tiled.add_to(residual.clone(), x), residual + inner(x))
    assert tiled.out_width == 24
