"""Tries products out on a processor with AMX, at start: in tiles, in vectors, and by oneDNN.

From how many rows on tiles are faster depends on how fast a processor reads weights, and whether
oneDNN's product of many rows is faster still was known of none: so it is measured where it matters,
in a fraction of a second. Rules: contenders take turns, the best of some rounds counts.
Must not know: networks, how products are computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fastserve.model.kernels.cpu import onednn
from fastserve.model.kernels.cpu.panels import Panels, pack_panels

WIDTH, DEPTH = 4096, 1024
"""Of the weight: larger than a core's own cache."""

FEW_ROWS = (4, 8, 16)
MANY_ROWS = (32, 128)
ROUNDS = 5

MARGIN = 1.1
"""How much slower tiles may be than oneDNN: layers are one program then, which gains more."""

Clock = Callable[[], float]


class Projections(Protocol):
    """Kernels that multiply weights in panels."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def per_lane(self) -> int: ...

    def project(self, x: Tensor, weight: Panels) -> Tensor: ...


def try_products(
    vectors: Projections, tiles: Projections, clock: Clock = time.perf_counter
) -> tuple[int, float]:
    """Return from how many rows on tiles pay, and up to how many rows our own products do."""
    weight = torch.ones(WIDTH, DEPTH, dtype=tiles.dtype)
    tensor = pack_panels(weight, tiles.per_lane)
    panels = Panels(tensor, tensor.data_ptr(), None, WIDTH, DEPTH, tensor[0].numel())
    last = max(FEW_ROWS)
    tile_rows = last + 1
    for rows in FEW_ROWS:
        x = torch.ones(rows, DEPTH, dtype=tiles.dtype)
        contenders = [partial(kernels.project, x, panels) for kernels in (tiles, vectors)]
        in_tiles, in_vectors = best_seconds(contenders, clock)
        if in_tiles < in_vectors:
            tile_rows = rows
            break
    if not onednn.can_pack(weight):
        return tile_rows, math.inf
    packed = onednn.pack(weight)
    for rows in MANY_ROWS:
        x = torch.ones(rows, DEPTH, dtype=tiles.dtype)
        contenders = [partial(tiles.project, x, panels), partial(onednn.product, x, packed)]
        in_tiles, by_onednn = best_seconds(contenders, clock)
        if in_tiles > MARGIN * by_onednn:
            return tile_rows, last
    return tile_rows, math.inf


def best_seconds(products: list[partial[Tensor]], clock: Clock) -> list[float]:
    """Return the seconds that each product takes."""
    rounds = []
    for _ in range(ROUNDS):
        seconds = []
        for product in products:
            product()  # what another one has left in the cache, or awake
            started = clock()
            product()
            seconds.append(clock() - started)
        rounds.append(seconds)
    return [min(times) for times in zip(*rounds, strict=True)]
