"""What moving KV came to: bytes, stalls and gaps of a variant, over the seeds.

Must not know: which experiment it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from experiments.capacity import over_seeds
from experiments.harness import Labels, Result

GB = 1e9


def gigabytes(name: str) -> Callable[[Result], float]:
    """Return the figure: bytes of the report, in GB."""
    return lambda result: float(result.report[f"{name}_bytes"]) / GB


def stall_per_preemption_s(result: Result) -> float:
    """Return the seconds for which a preemption kept a request waiting for its KV, in the mean.

    NaN where nobody was preempted.
    """
    report = result.report
    if not report["preemptions"]:
        return math.nan
    return float(report["breakdown_s"]["swap"] * report["completed"] / report["preemptions"])


def swap_share(result: Result) -> float:
    """Return the share of the mean JCT in which a request waited for its KV."""
    return float(result.report["breakdown_s"]["swap"] / result.report["jct_s"]["mean"])


def gap_p99_s(result: Result) -> float:
    """Return the P99 of the longest pause in an answer."""
    return float(result.report["max_gap_s"]["p99"])


FIGURES: dict[str, Callable[[Result], float]] = {
    "swap_out_gb": gigabytes("swap_out"),
    "saved_gb": gigabytes("saved"),
    "wasted_gb": gigabytes("wasted"),
    "swap_in_gb": gigabytes("swap_in"),
    "fetched_gb": gigabytes("fetched"),
    "stall_per_preemption_s": stall_per_preemption_s,
    "swap_share_of_jct": swap_share,
    "copy_wait_s": lambda result: float(result.report["copy_wait_s"]),
    "gap_p99_s": gap_p99_s,
    "recomputed_tokens": lambda result: float(result.report["recomputed_tokens"]),
    "preemptions": lambda result: float(result.report["preemptions"]),
}


def moved(results: Sequence[Result], labels: Labels) -> dict[str, Any]:
    """Return every figure of the points with these labels, mean and deviation over the seeds."""
    return {name: over_seeds(results, labels, figure) for name, figure in FIGURES.items()}
