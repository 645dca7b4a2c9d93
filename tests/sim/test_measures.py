"""The arithmetic of latency reports."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.sim.measures import Times, percentile, summary

FLOATS = st.floats(0, 1e6, allow_nan=False)
TIMES = Times(
    arrived_at=np.array([0.0, 1.0, 2.0]),
    first_token_at=np.array([1.5, 4.0, 6.0]),
    finished_at=np.array([4.0, 7.0, 6.0]),
    max_gap_s=np.array([0.5, 0.25, 0.0]),
    output_tokens=np.array([2, 3, 1]),
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("jct_s", [4.0, 6.0, 4.0]),
        ("ttft_s", [1.5, 3.0, 4.0]),
        ("normalized_latency_s", [2.0, 2.0, 4.0]),
        ("tpot_s", [2.5, 1.5, np.nan]),  # one token has no time per further token
        ("max_gap_s", [0.5, 0.25, 0.0]),
    ],
)
def test_each_measure_by_hand(name, expected):
    """All count from arrival, and no two columns are equal, so a mix-up would show."""
    np.testing.assert_array_equal(TIMES.latencies()[name], expected)


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1.0), (50, 2.5), (75, 3.25), (99, 3.97), (100, 4.0)]
)
def test_percentile_by_hand(percent, expected):
    """Between ranks the value is interpolated; order of the input does not matter."""
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == pytest.approx(expected)


@given(st.lists(FLOATS, min_size=1, max_size=40), st.floats(0, 100))
def test_percentile_agrees_with_the_definition(values, percent):
    """The naive oracle: walk to the rank, and as far as it lies beyond towards the next."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = ordered[int(rank)]
    above = ordered[min(int(rank) + 1, len(ordered) - 1)]
    expected = below + (above - below) * (rank - int(rank))
    assert percentile(values, percent) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_percentile_of_nothing_is_an_error():
    """A report over no requests must not look like a fast one."""
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_summary_by_hand():
    """Mean and maximum stand beside the percentiles; what does not exist does not count."""
    expected = {"mean": 2.0, "p50": 2.0, "p95": 2.9, "p99": 2.98, "max": 3.0}
    assert summary([1.0, 3.0]) == pytest.approx(expected)
    assert summary([1.0, float("nan"), 3.0]) == pytest.approx(expected)
    assert summary([]) == dict.fromkeys(expected)
