"""The arithmetic of latency reports."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.bench.latency import Timing, percentile, report, summary

FLOATS = st.floats(0, 1e6, allow_nan=False)


def test_measures_of_one_request():
    """JCT and TTFT count from arrival; normalized latency divides by the output length."""
    timing = Timing(
        arrived_at=10.0,
        first_token_at=10.5,
        last_token_at=14.0,
        max_gap_s=1.5,
        num_output_tokens=8,
    )
    assert timing.jct == 4.0
    assert timing.ttft == 0.5
    assert timing.normalized_latency == 0.5


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1.0), (50, 2.5), (75, 3.25), (99, 3.97), (100, 4.0)]
)
def test_percentile_by_hand(percent, expected):
    """Between ranks the value is interpolated; order of the input does not matter."""
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == pytest.approx(expected)


@given(st.lists(FLOATS, min_size=1, max_size=40), st.floats(0, 100))
def test_percentile_agrees_with_numpy(values, percent):
    """NumPy's default definition is the oracle."""
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def test_percentile_of_nothing_is_an_error():
    """A report over no requests must not look like a fast one."""
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_summary_by_hand():
    """Mean and maximum stand beside the percentiles."""
    assert summary([1.0, 3.0]) == pytest.approx(
        {"mean": 2.0, "p50": 2.0, "p95": 2.9, "p99": 2.98, "max": 3.0}
    )


def test_report_takes_each_measure_from_its_own_column():
    """No two measures of these requests are equal, so a mix-up would show."""
    figures = report([Timing(0.0, 1.5, 4.0, 0.5, 2), Timing(1.0, 4.0, 7.0, 0.25, 3)])
    assert figures["jct_s"]["mean"] == 5.0
    assert figures["ttft_s"]["mean"] == 2.25
    assert figures["normalized_latency_s"]["mean"] == 2.0
    assert figures["jct_s"]["max"] == 6.0
    assert figures["max_gap_s"]["max"] == 0.5
