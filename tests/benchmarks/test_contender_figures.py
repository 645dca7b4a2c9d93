"""Ratios of engines that took turns, and what the machine allows."""

from __future__ import annotations

import pytest

from benchmarks.contender_figures import Weights, floor_of, medians, ratios, weights_of
from benchmarks.small_model import LARGER

FLOORS = {"copy_gb_per_s": 50.0, "product_gflop_per_s": 1000.0}


def test_the_weights_of_a_llama() -> None:
    """100 million of them, as docs/performance.md says."""
    attention = 768 * (768 + 2 * 256 + 768)
    assert weights_of(LARGER) == Weights(12 * (attention + 3 * 768 * 2048), 32000 * 768)
    assert sum(weights_of(LARGER)) == pytest.approx(100e6, rel=0.01)


def test_few_rows_are_bound_by_reading_and_many_by_products() -> None:
    """The head multiplies only the rows that get logits."""
    weights = Weights(layers=75_000_000, head=25_000_000)
    one = floor_of(weights, tokens=1, rows_with_logits=1, floors=FLOORS)
    assert one.bound_by == "copy"
    assert one.tokens_per_s == pytest.approx(250.0)  # 200 MB at 50 GB/s: 4 ms
    batch = floor_of(weights, tokens=32, rows_with_logits=32, floors=FLOORS)
    assert batch.bound_by == "product"
    assert batch.tokens_per_s == pytest.approx(5000.0)  # 6.4 GFLOP at 1 TFLOP/s: 6.4 ms
    prefill = floor_of(weights, tokens=1000, rows_with_logits=1, floors=FLOORS)
    assert prefill.tokens_per_s == pytest.approx(1000 / 0.15005)


def test_a_ratio_is_of_one_round() -> None:
    """A machine that slows down by half between rounds changes no ratio."""
    found = ratios([10.0, 5.0, 6.0], [10.0, 5.0, 5.0])
    assert found == (1.0, 1.0, 1.2)
    assert str(found) == "1.00 (1.00–1.20)"
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


def test_medians_are_taken_by_name() -> None:
    """Each over all rounds."""
    rounds = [{"a": 1.0, "b": 9.0}, {"a": 3.0, "b": 7.0}, {"a": 2.0, "b": 8.0}]
    assert medians(rounds) == {"a": 2.0, "b": 8.0}
