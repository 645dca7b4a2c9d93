"""What moving KV came to, from reports of known numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from experiments.harness import Result
from experiments.moved import moved

REPORT: dict[str, Any] = {
    "completed": 10, "preemptions": 40, "swap_out_bytes": 3e9, "saved_bytes": 2e9,
    "wasted_bytes": 1e9, "swap_in_bytes": 2.5e9, "fetched_bytes": 1.5e9, "copy_wait_s": 0.5,
    "recomputed_tokens": 7, "jct_s": {"mean": 8.0}, "max_gap_s": {"p99": 1.5},
    "breakdown_s": {"queue": 1.0, "swap": 0.2, "execute": 6.8},
}  # fmt: skip


def result(seed: int, **changes: Any) -> Result:
    """Return a result with the report above, changed."""
    return Result({"variant": "v", "seed": seed}, {**REPORT, **changes}, {})


def test_bytes_and_stalls_are_means_over_the_seeds() -> None:
    """A stall is all waiting for KV over all preemptions, not over all requests."""
    found = moved([result(0), result(1, swap_out_bytes=5e9)], {"variant": "v"})
    assert found["swap_out_gb"]["mean"] == pytest.approx(4.0)
    assert found["fetched_gb"]["mean"] == pytest.approx(1.5)
    assert found["stall_per_preemption_s"]["mean"] == pytest.approx(0.2 * 10 / 40)
    assert found["swap_share_of_jct"]["mean"] == pytest.approx(0.025)
    assert found["gap_p99_s"]["mean"] == 1.5


def test_without_preemptions_there_is_no_stall() -> None:
    """Not a stall of zero seconds."""
    found = moved([result(0, preemptions=0)], {"variant": "v"})
    assert math.isnan(found["stall_per_preemption_s"]["mean"])
