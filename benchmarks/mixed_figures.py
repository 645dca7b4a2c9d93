"""The figures of several policies under one workload: summaries, ratios, a table.

Rules: plain arithmetic. A ratio is the first policy's figure over another's: above 1 the other is
that many times lower. Must not know: servers, files, how the times came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.load_client import Run, Timing
from benchmarks.mixed_workload import is_short
from fastserve.sim.measures import Times, summary

SHOWN: Mapping[str, Sequence[str]] = {
    "jct_s": ("mean", "p50", "p95", "p99"),
    "normalized_latency_s": ("mean", "p99"),
    "ttft_s": ("mean", "p99"),
    "max_gap_s": ("p99", "max"),
}
GROUPS = ("short", "long")

Figures = dict[str, Any]


def report(timings: Sequence[Timing]) -> dict[str, dict[str, float | None]]:
    """Return a summary of each measure."""
    columns = zip(Timing._fields, map(np.array, zip(*timings, strict=True)), strict=True)
    return {name: summary(values) for name, values in Times(**dict(columns)).latencies().items()}


def describe(policy: str, runs: Sequence[Run], *, is_mix: bool) -> Figures:
    """Return the figures of one run, or of several of one policy taken together."""
    timings = [timing for run in runs for timing in run.timings]
    tokens = sum(timing.output_tokens for timing in timings)
    figures: Figures = {
        "policy": policy,
        "requests": len(timings),
        "lost": sum(len(run.lost) for run in runs),
        "tokens_per_s": tokens / sum(run.makespan_s for run in runs),
        "overrun_tokens": sum(run.overrun_tokens for run in runs),
        "makespan_s": [run.makespan_s for run in runs],
        "client_lateness_s": max(run.lateness_s for run in runs),
        **report(timings),
    }
    if is_mix:
        shorts = [timing for timing in timings if is_short(timing.output_tokens)]
        longs = [timing for timing in timings if not is_short(timing.output_tokens)]
        groups = zip(GROUPS, (shorts, longs), strict=True)
        figures |= {name: report(group) for name, group in groups if group}
    return figures


def ratios(first: Figures, other: Figures) -> dict[str, dict[str, float | None]]:
    """Return first / other of the figures of all requests; None where one of them is 0."""
    return {
        measure: {name: quotient(first[measure][name], other[measure][name]) for name in names}
        for measure, names in SHOWN.items()
    }


def quotient(before: float, after: float) -> float | None:
    """Return before / after where both are above 0."""
    return before / after if before > 0 and after > 0 else None


def as_table(policies: Sequence[Figures], title: str) -> Table:
    """Lay figures out for people, one column a policy."""
    table = Table("seconds", *(each["policy"] for each in policies), title=title)
    groups = {"": policies}
    for name in GROUPS:
        if all(name in each for each in policies):
            groups[f"{name}: "] = [each[name] for each in policies]
    for heading, group in groups.items():
        for measure, names in SHOWN.items():
            label = measure.removesuffix("_s").replace("_", " ")
            for name in names:
                cells = [f"{each[measure][name]:.3f}" for each in group]
                table.add_row(f"{heading}{label} {name}", *cells)
        table.add_section()
    table.add_row("output tokens/s", *(f"{each['tokens_per_s']:.0f}" for each in policies))
    table.add_row("tokens generated unread", *(str(each["overrun_tokens"]) for each in policies))
    table.add_row("lost requests", *(str(each["lost"]) for each in policies))
    return table
