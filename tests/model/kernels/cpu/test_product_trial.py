"""What is chosen on a processor with AMX, by a clock that passes only where it is said to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch

from fastserve.model.kernels.cpu import kernel_choice, onednn, product_trial
from fastserve.model.kernels.cpu.kernel_choice import choose_kernels
from fastserve.model.kernels.cpu.native import load_native
from fastserve.model.kernels.cpu.panels import Panels
from fastserve.model.kernels.cpu.product_trial import try_onednn, try_tiles
from tests.model.kernels.cpu.kernel_cases import needs_int8


@dataclass
class Clock:
    """Time that only contenders let pass."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Contender:
    """Products that take `fixed` seconds and some for each row; every other one is disturbed."""

    clock: Clock
    fixed: float
    per_row: float
    dtype: torch.dtype = torch.bfloat16
    per_lane: int = 2
    rows: list[int] = field(default_factory=list)

    def product(self, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        assert packed.shape == (64, 32)
        return self.project(x)

    def project(self, x: torch.Tensor, weight: Panels | None = None) -> torch.Tensor:
        self.rows.append(len(x))
        disturbance = 5.0 * (len(self.rows) % 4 == 0)
        self.clock.now += self.fixed + self.per_row * len(x) + disturbance
        return x


@pytest.fixture
def small(monkeypatch):
    """Let the weight be small: nothing is computed with it."""
    monkeypatch.setattr(product_trial, "WIDTH", 64)
    monkeypatch.setattr(product_trial, "DEPTH", 32)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("tiles", "packed", "chosen"),
    [
        ((0.8, 0.01), (2.0, 0.01), (4, math.inf)),  # vectors take 0.5 and 0.1 a row
        ((0.8, 0.01), (0.5, 0.01), (4, 16)),
        ((1.5, 0.03), (1.4, 0.03), (16, math.inf)),  # within the margin
        ((1.9, 0.03), (1.0, 0.01), (17, 16)),
    ],
)
def test_the_faster_ones_are_chosen(monkeypatch, tiles, packed, chosen):
    """From the rows on where tiles win, and oneDNN's only where they win clearly."""
    clock = Clock()
    in_vectors, in_tiles = Contender(clock, 0.5, 0.1), Contender(clock, *tiles)
    by_onednn = Contender(clock, *packed)
    monkeypatch.setattr(onednn, "can_pack", lambda weight: True)
    monkeypatch.setattr(onednn, "pack", lambda weight: weight)
    monkeypatch.setattr(onednn, "product", by_onednn.product)
    found = try_tiles(in_vectors, in_tiles, clock), try_onednn(in_tiles, clock)
    assert found == chosen
    assert {32} <= set(by_onednn.rows) <= {32, 512}


@pytest.mark.usefixtures("small")
def test_without_onednn_all_products_are_ours(monkeypatch):
    """A torch that packs no weights leaves nothing to compare with."""
    clock = Clock()
    monkeypatch.setattr(onednn, "can_pack", lambda weight: False)
    assert try_onednn(Contender(clock, 1.0, 0.01), clock) == math.inf


@pytest.fixture
def library(monkeypatch):
    """Give choices a library whose tiles are granted or not."""
    library = load_native()
    monkeypatch.setattr(library, "knows_tiles", lambda: True)
    monkeypatch.setattr(library, "has_tiles", lambda: True)
    monkeypatch.setattr(kernel_choice, "load_native", lambda: library)
    return library


@needs_int8
@pytest.mark.usefixtures("library")
def test_trials_decide(monkeypatch):
    """Where there are tiles; rows by themselves are all computed in them; oneDNN if it may be."""
    monkeypatch.setattr(kernel_choice, "try_tiles", lambda vectors, tiles: 8 * tiles.tile_rows)
    monkeypatch.setattr(kernel_choice, "try_onednn", lambda tiles: 16 * tiles.tile_rows)
    found = []
    for arguments in ({}, {"max_rows": math.inf}, {"is_rowwise": True}):
        kernels = choose_kernels("native", torch.bfloat16, **arguments)
        assert kernels is not None
        found.append((kernels.tile_rows, kernels.max_rows, kernels.is_rowwise, kernels.name))
    assert found == [
        (8, 16, False, "native-amx8-16"),
        (8, math.inf, False, "native-amx8"),
        (1, math.inf, True, "native-amx1"),
    ]
    single = choose_kernels("native", torch.float32)
    assert single is not None
    assert (single.tile_rows, single.name) == (0, "native")


@needs_int8
def test_tiles_that_are_not_granted(monkeypatch, library, caplog):
    """Products are those of vectors then, and a line says so."""
    monkeypatch.setattr(library, "has_tiles", lambda: False)
    for is_rowwise in (False, True):
        kernels = choose_kernels("native", torch.bfloat16, is_rowwise=is_rowwise)
        assert kernels is not None
        assert (kernels.tile_rows, kernels.name) == (0, "native")
    assert "the system grants no tiles" in caplog.text
