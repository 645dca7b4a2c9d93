"""Capacity and spread, by hand."""

from __future__ import annotations

import math

import pytest

from experiments.capacity import capacities, crossing, norm_mean, spread
from experiments.harness import Result


def test_crossing_interpolates() -> None:
    """The limit is found between two rates on a log scale, first crossing first."""
    assert crossing([1.0, 2.0, 3.0], [0.1, 0.1, 0.9], 0.3) == pytest.approx(2.5)
    assert crossing([1.0, 2.0, 3.0], [0.1, 10.0, 0.1], 1.0) == pytest.approx(1.5)


@pytest.mark.parametrize("values", [[0.1, 0.2], [0.4, 0.5]])
def test_no_crossing_is_nan(values: list[float]) -> None:
    """A curve that never crosses, or is above from the start, has no capacity."""
    assert math.isnan(crossing([1.0, 2.0], values))


def test_capacity_is_per_seed() -> None:
    """Capacity is found for each seed, then averaged; other points do not count."""
    rows = [("a", 0, 1.0, 0.1), ("a", 0, 2.0, 0.9), ("a", 1, 1.0, 0.3), ("a", 1, 2.0, 3.0)]
    results = [
        Result(
            {"policy": policy, "seed": seed, "rate": rate},
            {"normalized_latency_s": {"mean": latency}},
            {},
        )
        for policy, seed, rate, latency in [*rows, ("b", 0, 1.5, 99.0)]
    ]
    found = capacities(results, {"policy": "a"}, norm_mean)
    assert found == {"mean": pytest.approx(1.25), "std": pytest.approx(0.5**0.5 / 2), "n": 2}


def test_spread_leaves_out_what_is_missing() -> None:
    """NaN does not count, and its absence is visible in n."""
    assert spread([1.0, math.nan, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "n": 2}
    assert spread([math.nan])["n"] == 0
