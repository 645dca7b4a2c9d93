"""Tiles of proven heights: which heights are trusted, and how rows are covered by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor

from fastserve.model.ops import tiled_linear
from fastserve.model.ops.interfaces import LinearOp
from fastserve.model.ops.layers import Linear
from fastserve.model.ops.tiled_linear import (
    HEIGHTS,
    MAX_CUTS,
    TiledLinear,
    agreeing_heights,
    cut_rows,
)

CPU = torch.device("cpu")
MORE = 1 + 2**-20
Damage = Callable[[Tensor], object]


def heights_of(damage: Damage, dtype: torch.dtype = torch.float32) -> tuple[int, ...]:
    """Return the heights trusted for a product that takes one row at a time, and then suffers."""

    def make(weight: Tensor, bias: Tensor | None) -> LinearOp:
        linear = Linear(weight, bias)

        def product(x: Tensor) -> Tensor:
            y = torch.cat([linear(row[None]) for row in x])
            damage(y)
            return y

        return cast("LinearOp", product)

    return agreeing_heights(make, in_width=41, out_width=24, has_bias=True, dtype=dtype, device=CPU)


def test_heights_that_give_other_bits_are_not_used() -> None:
    """A product that treats one or two rows differently loses these heights only."""
    assert heights_of(lambda y: None) == HEIGHTS
    assert heights_of(lambda y: y.mul_(MORE) if len(y) <= 2 else None) == HEIGHTS[:-2]


def test_heights_whose_rows_are_treated_differently_are_not_used() -> None:
    """A product that treats rows from 100 on differently loses the heights that have these."""
    assert heights_of(lambda y: y[100:].mul_(MORE)) == tuple(h for h in HEIGHTS if h <= 64)


def test_the_last_row_counts_too() -> None:
    """A product that treats the last row of any tile differently leaves single rows only."""
    assert heights_of(lambda y: y[-1].mul_(MORE) if len(y) > 1 else None) == (1,)


def test_a_product_that_is_never_the_same_is_refused() -> None:
    """Where not even one row alone is reproducible, there is nothing to build on."""
    with pytest.raises(RuntimeError, match="not reproducible"):
        heights_of(lambda y: y.normal_())


def test_wide_results_have_short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result of a tile stays within its memory."""
    monkeypatch.setattr(tiled_linear, "MAX_TILE_ELEMENTS", 24 * 20)
    assert heights_of(lambda y: None) == tuple(h for h in HEIGHTS if h <= 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_order_of_summation_is_found_out(dtype: torch.dtype) -> None:
    """One row summed back to front: float32 shows it, and so does bfloat16, which rounds most."""

    def make(weight: Tensor, bias: Tensor | None) -> LinearOp:
        def product(x: Tensor) -> Tensor:
            terms = (x.float()[:, :, None] * weight.float().t()).unbind(1)  # in × [rows, out]
            return sum(reversed(terms) if len(x) == 1 else terms, torch.zeros(())).to(x.dtype)

        return cast("LinearOp", product)

    heights = agreeing_heights(
        make, in_width=64, out_width=24, has_bias=False, dtype=dtype, device=CPU
    )
    assert heights == HEIGHTS[:-1]


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
    assert cut_rows(17, HEIGHTS) == ((0, 17, 32),)
    assert cut_rows(512, HEIGHTS) == ((0, 512, 512),)
    assert cut_rows(130, HEIGHTS) == ((0, 128, 128), (128, 130, 2))
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


def test_steps_of_ever_other_sizes_leave_little_behind():
    """Cuts are kept once for all projections, and of the latest numbers of rows only."""
    projections = [TiledLinear(Linear(torch.randn(8, 4), None), (64, 4)) for _ in range(4)]
    cut_rows.cache_clear()
    for num_rows in range(100, 100 + MAX_CUTS):
        for projection in projections:
            projection(torch.zeros(num_rows, 4))
    found = cut_rows.cache_info()
    assert (found.misses, found.hits) == (MAX_CUTS, 3 * MAX_CUTS)
    cut_rows(10_000, (64, 4))
    assert cut_rows.cache_info().currsize == MAX_CUTS
