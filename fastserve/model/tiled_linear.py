"""TiledLinear: a projection whose rows have the same bits in any company.

Rules: the product is only ever asked for in a few tile heights, the last tile padded with zeros. A
matrix kernel is free to add up in another order for another number of rows, and often does for one
row; so a height is used only after it was shown, on this machine and for this shape of weight, to
give each row the bits that the tallest height gives it, wherever in the tile the row stands.
Must not know: networks, batches, what computes the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastserve.model.ops import LinearOp

HEIGHTS = (512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
"""Rows of a tile; the tallest is what a step on a CPU usually has at most."""

MAX_TILE_ELEMENTS = 2**24
"""Elements of a tile's result, which is what a tile costs in memory."""

SMALL_HEIGHT = 32
"""Up to here a product waits for the weight, and a row of padding costs next to nothing."""

MAX_PADDING = 0.25
"""Share of a taller tile that may be padding, before a second tile is the cheaper way."""

Cut = tuple[int, int, int]  # start, stop, height


class TiledLinear:
    """y = x Wᵀ + b, by tiles. Fits `LinearOp`."""

    __slots__ = ("_cuts", "heights", "inner", "out_width")

    def __init__(self, inner: LinearOp, heights: Sequence[int]) -> None:
        self.inner = inner
        self.heights = tuple(heights)
        self.out_width = inner.out_width
        self._cuts: dict[int, list[Cut]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Fit `LinearOp`."""
        num_rows = len(x)
        cuts = self._cuts.get(num_rows)
        if cuts is None:
            cuts = self._cuts[num_rows] = cut_rows(num_rows, self.heights)
        parts = [self._tile(x[start:stop], height) for start, stop, height in cuts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Fit `LinearOp`: the sum is taken after the product was rounded, in any tile alike."""
        return residual.add_(self(x))

    def _tile(self, x: Tensor, height: int) -> Tensor:
        if len(x) == height:
            return self.inner(x)
        return self.inner(F.pad(x, (0, 0, 0, height - len(x))))[: len(x)]


def cut_rows(num_rows: int, heights: Sequence[int]) -> list[Cut]:
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
    return cuts


def agreeing_heights(
    product: Callable[[Tensor], Tensor],  # [height, in] to [height, out]
    *,
    in_width: int,
    out_width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[int, ...]:
    """Return the tile heights that give the same bits, wherever in the tile a row stands.

    Tiles are compared over the same random rows, and over these rows moved by one place. One row
    alone, which may be all that is left, must only give the same bits twice.
    """
    tallest = max(MAX_TILE_ELEMENTS // out_width, 1)
    heights = [height for height in HEIGHTS if height <= tallest]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(heights[0] + 1, in_width, generator=generator).to(device, dtype)
    for index, height in enumerate(heights):
        expected = product(rows[:height])
        moved = min(1, height - 1)
        again = product(rows[moved : moved + height])
        if torch.equal(again[: height - moved], expected[moved:]):
            return height, *(
                lower for lower in heights[index + 1 :] if _agrees(product, lower, rows, expected)
            )
    raise RuntimeError(f"a product of [1, {in_width}] to [1, {out_width}] is not reproducible")


def _agrees(
    product: Callable[[Tensor], Tensor], height: int, rows: Tensor, expected: Tensor
) -> bool:
    for first in (0, 1, len(expected) - height):
        tile = rows[first : first + height].clone()  # as aligned as a padded one
        if not torch.equal(product(tile), expected[first : first + height]):
            return False
    return True
