"""TiledLinear: a projection whose rows have the same bits in any batch.

Rules: the product is only ever asked for in a few tile heights, the last tile padded with zeros. A
matrix kernel is free to add up in another order for another number of rows, and often does for one
row; so a height is used only after it was shown, on this machine and for this shape of weight, to
give each row the bits that the tallest height gives it, wherever in the tile the row stands.
Must not know: networks, batches, what computes the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastserve.model.ops.interfaces import LinearOp

HEIGHTS = (512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
"""Rows of a tile; the tallest is what a step on a CPU usually has at most."""

MAX_TILE_ELEMENTS = 2**24
"""Elements of a tile's result, which is what a tile costs in memory."""

SMALL_HEIGHT = 32
"""Up to here a product waits for the weight, and a row of padding costs next to nothing."""

MAX_PADDING = 0.25
"""Share of a taller tile that may be padding, before a second tile is the cheaper way."""

MAX_CUTS = 256
"""Numbers of rows whose cuts are kept; all projections of a step ask for the same ones."""

Cut = tuple[int, int, int]  # start, stop, height


class TiledLinear:
    """y = x Wᵀ + b, by tiles. Fits `LinearOp`."""

    is_rowwise = True
    __slots__ = ("heights", "inner", "out_width")

    def __init__(self, inner: LinearOp, heights: Sequence[int]) -> None:
        self.inner = inner
        self.heights = tuple(heights)
        self.out_width = inner.out_width

    def __call__(self, x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        if num_rows in self.heights:
            return self.inner(x)
        cuts = cut_rows(num_rows, self.heights)
        parts = [self._tile(x[start:stop], height) for start, stop, height in cuts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Fit `LinearOp`: the sum is taken after the product was rounded, in any tile alike."""
        return residual.add_(self(x))

    def _tile(self, x: Tensor, height: int) -> Tensor:
        if len(x) == height:
            return self.inner(x)
        return self.inner(F.pad(x, (0, 0, 0, height - len(x))))[: len(x)]


@lru_cache(maxsize=MAX_CUTS)
def cut_rows(num_rows: int, heights: tuple[int, ...]) -> tuple[Cut, ...]:
    """Cover rows by tiles of some of `heights`; only the last tile may be padded."""
    ascending = sorted(heights)
    cuts: list[Cut] = []
    start = 0
    while start < num_rows or not cuts:
        left = num_rows - start
        height = next((height for height in ascending if height >= left), ascending[-1])
        shorter = [height for height in ascending if height <= left]
        if height > SMALL_HEIGHT and shorter and height - left > MAX_PADDING * height:
            height = shorter[-1]
        stop = min(start + height, num_rows)
        cuts.append((start, stop, height))
        start = stop
    return tuple(cuts)


def agreeing_heights(
    make: Callable[[Tensor, Tensor | None], LinearOp],
    *,
    in_width: int,
    out_width: int,
    has_bias: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[int, ...]:
    """Return the tile heights that give the same bits, wherever in the tile a row stands.

    Tiles of a product of this shape are compared over the same rows, and over these rows moved by
    one place. One row alone, which may be all that is left, must only give the same bits twice.
    """
    tallest = max(MAX_TILE_ELEMENTS // out_width, 1)
    heights = [height for height in HEIGHTS if height <= tallest]
    rows, weight, bias = _cancelling(heights[0] + 1, in_width, out_width)
    rows, weight, bias = (tensor.to(device, dtype) for tensor in (rows, weight, bias))
    product = make(weight, bias if has_bias else None)
    for index, height in enumerate(heights):
        expected = product(rows[:height])
        moved = min(1, height - 1)
        again = product(rows[moved : moved + height])
        if torch.equal(again[: height - moved], expected[moved:]):
            return height, *(
                lower for lower in heights[index + 1 :] if _agrees(product, lower, rows, expected)
            )
    raise RuntimeError(f"a product of [1, {in_width}] to [1, {out_width}] is not reproducible")


def _cancelling(num_rows: int, in_width: int, out_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, a weight and a bias whose products are nothing but what rounding leaves.

    Every term comes once with either sign, far apart: the sums are zero but for their rounding, so
    that another order shows in nearly every one. In a sum of random terms it would be rounded away
    in bfloat16, all but once in thousands.
    """
    generator = torch.Generator().manual_seed(0)
    half = in_width // 2
    order = torch.randperm(half, generator=generator)
    rows = torch.randn(num_rows, half, generator=generator)
    weight = torch.randn(out_width, half, generator=generator)
    rest = in_width - 2 * half
    return (
        torch.cat((rows, -rows[:, order], rows.new_zeros(num_rows, rest)), dim=1),
        torch.cat((weight, weight[:, order], weight.new_zeros(out_width, rest)), dim=1),
        torch.randn(out_width, generator=generator) * 2.0**-18,  # as large as what rounding leaves
    )


def _agrees(product: LinearOp, height: int, rows: Tensor, expected: Tensor) -> bool:
    for first in (0, 1, len(expected) - height):
        tile = rows[first : first + height].clone()  # as aligned as a padded one
        if not torch.equal(product(tile), expected[first : first + height]):
            return False
    return True
