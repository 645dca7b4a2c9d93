"""Figures of policies beside each other, worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks.load_client import Run, Timing
from benchmarks.mixed_figures import as_table, describe, ratios

SHORT = Timing(10.0, 11.0, 14.0, 2.0, 8)
LONG = Timing(10.0, 20.0, 110.0, 3.0, 1000)


def run_of(*timings: Timing) -> Run:
    """Return a run of a hundred seconds."""
    return Run(list(timings), [], 100.0, 0.1, 5)


def test_runs_of_a_policy_are_taken_together():
    """Requests of both count alike, and the mix is told apart by length."""
    found = describe("fcfs", [run_of(SHORT, LONG), run_of(SHORT)], is_mix=True)
    assert (found["requests"], found["lost"], found["overrun_tokens"]) == (3, 0, 10)
    assert found["jct_s"]["mean"] == pytest.approx((4 + 100 + 4) / 3)
    assert found["normalized_latency_s"]["mean"] == pytest.approx((0.5 + 0.1 + 0.5) / 3)
    assert found["max_gap_s"]["max"] == 3.0
    assert found["tokens_per_s"] == pytest.approx(1016 / 200)
    assert found["short"]["jct_s"]["max"] == 4.0
    assert found["long"]["ttft_s"]["mean"] == 10.0


def test_ratios_are_over_the_first_policy():
    """Above 1 where the other is lower; none where there is nothing to divide."""
    slow = Timing(0.0, 4.0, 8.0, 0.0, 2)
    fast = Timing(0.0, 1.0, 4.0, 0.0, 2)
    before, after = (describe("p", [run_of(one)], is_mix=False) for one in (slow, fast))
    found = ratios(before, after)
    assert found["jct_s"] == dict.fromkeys(("mean", "p50", "p95", "p99"), 2.0)
    assert found["ttft_s"]["mean"] == 4.0
    assert found["max_gap_s"] == {"p99": None, "max": None}


@pytest.mark.parametrize(("is_mix", "rows"), [(True, 3 * 10 + 3), (False, 10 + 3)])
def test_the_table_has_a_column_for_each_policy(is_mix, rows):
    """Groups have rows only where the workload has groups."""
    figures = [describe(name, [run_of(SHORT, LONG)], is_mix=is_mix) for name in ("a", "b", "c")]
    table = as_table(figures, "title")
    assert [str(column.header) for column in table.columns] == ["seconds", "a", "b", "c"]
    assert table.row_count == rows
