"""Tries products out on a processor with AMX, at start: in tiles, in vectors, and by oneDNN.

From how many rows on tiles are faster depends on how fast a processor reads weights, and whether
oneDNN's product of many rows is faster still was known of none: so it is measured where it matters,
in a fraction of a second. Rules: contenders take turns, each with so many weights that they come
from memory, or from a cache that all cores share; the best of some rounds counts.
Must not know: networks, how products are computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fastserve.model.kernels.cpu import onednn
from fastserve.model.kernels.cpu.panels import Panels, pack_panels

WIDTH, DEPTH, NUM_WEIGHTS = 4096, 1024, 8
"""8 MB each."""

AMX_ROWS = 16
"""A tile has as many rows; beyond, oneDNN's products in tiles are faster than ours in vectors."""

FEW_ROWS = (4, 8, AMX_ROWS)
MANY_ROWS = (32, 512)
ROUNDS = 3

MARGIN = 1.1
"""How much slower tiles may be than oneDNN: layers are one program then, which gains more."""

Clock = Callable[[], float]
Product = Callable[[Tensor], Tensor]


class Projections(Protocol):
    """Kernels that multiply weights in panels."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def per_lane(self) -> int: ...

    def project(self, x: Tensor, weight: Panels) -> Tensor: ...


def try_tiles(vectors: Projections, tiles: Projections, clock: Clock = time.perf_counter) -> int:
    """Return from how many rows on tiles are faster than vectors."""
    weights = _make_panels(tiles)
    contenders = [
        [partial(kernels.project, weight=w) for w in weights] for kernels in (tiles, vectors)
    ]
    for rows in FEW_ROWS:
        in_tiles, in_vectors = best_seconds(contenders, rows, tiles.dtype, clock)
        if in_tiles < in_vectors:
            return rows
    return AMX_ROWS + 1


def try_onednn(tiles: Projections, clock: Clock = time.perf_counter) -> float:
    """Return up to how many rows products are to be ours."""
    weight = torch.ones(WIDTH, DEPTH, dtype=tiles.dtype)
    if not onednn.can_pack(weight):
        return math.inf
    own = [partial(tiles.project, weight=w) for w in _make_panels(tiles)]
    packed = [partial(onednn.product, packed=onednn.pack(weight)) for _ in own]
    for rows in MANY_ROWS:
        in_tiles, by_onednn = best_seconds([own, packed], rows, tiles.dtype, clock)
        if in_tiles > MARGIN * by_onednn:
            return AMX_ROWS
    return math.inf


def best_seconds(
    contenders: Sequence[Sequence[Product]], rows: int, dtype: torch.dtype, clock: Clock
) -> list[float]:
    """Return the seconds that each contender takes for a product with each of its weights."""
    x, rounds = torch.ones(rows, DEPTH, dtype=dtype), []
    for _ in range(ROUNDS):
        seconds = []
        for first, *others in contenders:
            first(x)  # threads of another contender may still be awake
            started = clock()
            for product in others:
                product(x)
            seconds.append(clock() - started)
        rounds.append(seconds)
    return [min(times) for times in zip(*rounds, strict=True)]


def _make_panels(kernels: Projections) -> list[Panels]:
    weight = torch.ones(WIDTH, DEPTH, dtype=kernels.dtype)
    tensors = [pack_panels(weight, kernels.per_lane) for _ in range(NUM_WEIGHTS)]
    return [Panels(t, t.data_ptr(), None, WIDTH, DEPTH, t[0].numel()) for t in tensors]
