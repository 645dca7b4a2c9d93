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
from fastserve.model.kernels.cpu.product_trial import try_products
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

    def project(self, x: torch.Tensor, weight: Panels | torch.Tensor) -> torch.Tensor:
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
    monkeypatch.setattr(onednn, "product", by_onednn.project)
    assert try_products(in_vectors, in_tiles, clock) == chosen
    assert {32} <= set(by_onednn.rows) <= {32, 128}


@pytest.mark.usefixtures("small")
def test_without_onednn_all_products_are_ours(monkeypatch):
    """A torch that packs no weights leaves nothing to compare with."""
    clock = Clock()
    monkeypatch.setattr(onednn, "can_pack", lambda weight: False)
    contenders = Contender(clock, 0.5, 0.1), Contender(clock, 1.0, 0.01)
    assert try_products(*contenders, clock) == (8, math.inf)


@needs_int8
def test_the_trial_decides(monkeypatch):
    """Where there are tiles; rows by themselves are all computed in them."""
    trials = []

    def trial(vectors, tiles):
        trials.append((vectors.tile_rows, tiles.tile_rows))
        return 8, 16

    library = load_native()
    monkeypatch.setattr(library, "has_tiles", lambda: True)
    monkeypatch.setattr(kernel_choice, "load_native", lambda: library)
    monkeypatch.setattr(kernel_choice, "try_products", trial)
    found = []
    for arguments in ({}, {"max_rows": math.inf}, {"is_rowwise": True}):
        kernels = choose_kernels("native", torch.bfloat16, **arguments)
        assert kernels is not None
        found.append((kernels.tile_rows, kernels.max_rows, kernels.is_rowwise))
    assert found == [(8, 16, False), (8, math.inf, False), (1, math.inf, True)]
    assert trials == [(0, 1)] * 2
    single = choose_kernels("native", torch.float32)
    assert single is not None
    assert single.tile_rows == 0
