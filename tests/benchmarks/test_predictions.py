"""Figures of live runs beside their predictions, from known times."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.predictions import Row, as_table, describe, together
from fastserve.sim.measures import Times


def times(*jct_s: float) -> Times:
    """Return requests that arrive at once and take so long."""
    ends = np.array(jct_s)
    return Times(
        arrived_at=np.zeros(len(ends)),
        first_token_at=ends / 2,
        finished_at=ends,
        max_gap_s=np.full(len(ends), np.nan),
        output_tokens=np.full(len(ends), 3),
    )


def row(policy: str, live: Times, simulated: Times) -> Row:
    """Return a run that was simulated at its own speed without an error."""
    return Row({"policy": policy}, live, simulated, live, 1.5)


def test_an_error_is_of_the_mean_of_all_requests() -> None:
    """Not the mean of the runs' errors: one run has more requests."""
    found = describe([row("a", times(1.0), times(2.0)), row("a", times(4.0, 4.0), times(4.0, 4.0))])
    assert found["policy"] == "a"
    assert found["requests"] == 3
    assert found["jct_s"]["mean"] == pytest.approx(3.0)
    assert found["simulated"]["error"] == pytest.approx(10 / 9 - 1)
    assert found["at_speed"]["error"] == pytest.approx(0.0)
    assert found["speed_factor"] == pytest.approx(1.5)


def test_runs_of_equal_labels_are_taken_together() -> None:
    """In the order of the first ones, and shown so."""
    rows = [row(policy, times(1.0), times(1.1)) for policy in ("b", "a", "b")]
    found = together(rows)
    assert [(entry["policy"], entry["requests"]) for entry in found] == [("b", 2), ("a", 1)]
    assert as_table(found, ["policy"], "title").row_count == 2
