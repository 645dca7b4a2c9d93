"""The figures of policies and modes under short KV: live beside simulated, and a table.

Rules: plain arithmetic. Runs of one arm are taken together: requests of all of them count alike.
An error is the simulator's mean JCT over the live one, less one. Must not know: engines, files, how
the runs came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from benchmarks.timed_engine import Run
from fastserve.core.messages import SchedulerStats
from fastserve.sim.measures import summary
from fastserve.sim.report import moved_bytes


class Measured(NamedTuple):
    """A live run, and seconds that its steps took over those predicted for them."""

    run: Run
    speed_factor: float


class Row(NamedTuple):
    """One arm once: live, simulated, and simulated at the speed of its own steps."""

    arm: str
    live: Measured
    simulated: Run
    at_speed: Run


COUNTS = ("num_steps", "num_preemptions", "num_swaps", "num_recomputed_tokens", "num_failed_copies")


def latencies(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Return a summary of each measure over the requests of all runs."""
    tables = [run.times.latencies() for run in runs]
    return {name: summary(np.concatenate([table[name] for table in tables])) for name in tables[0]}


def counted(runs: Sequence[Run], block_bytes: int) -> dict[str, float]:
    """Return what the schedulers counted, summed, and the share of time lost to copies."""
    totals: dict[str, float] = {}
    for run in runs:
        counts: dict[str, float] = {name: getattr(run.stats, name) for name in COUNTS}
        for name, value in (counts | moved_bytes(run.stats, block_bytes)).items():
            totals[name] = totals.get(name, 0) + value
    makespan_s = sum(run.makespan_s for run in runs)
    copy_wait_s = sum(run.stats.copy_wait_s for run in runs)
    share = copy_wait_s / makespan_s
    return {**totals, "makespan_s": makespan_s, "copy_wait_s": copy_wait_s,
            "copy_wait_share": share}  # fmt: skip


def describe(rows: Sequence[Row], block_bytes: int) -> dict[str, Any]:
    """Return the figures of one run, or of several of one arm taken together."""
    live = [row.live.run for row in rows]
    found: dict[str, Any] = {
        "arm": rows[0].arm,
        "requests": sum(len(run.times.arrived_at) for run in live),
        **latencies(live),
        **counted(live, block_bytes),
        "speed_factor": float(np.mean([row.live.speed_factor for row in rows])),
    }
    mean_s = found["jct_s"]["mean"]
    for name, runs in (("simulated", [row.simulated for row in rows]),
                       ("at_speed", [row.at_speed for row in rows])):  # fmt: skip
        by_name = latencies(runs)
        error = by_name["jct_s"]["mean"] / mean_s - 1
        found[name] = {**by_name, **counted(runs, block_bytes), "error": error}
    return found


def mean_jcts(row: Row) -> dict[str, Any]:
    """Return the mean JCT of one run of an arm beside what was predicted for it, in seconds."""
    runs = {"live": row.live.run, "simulated": row.simulated, "at_speed": row.at_speed}
    means = {name: float(run.times.latencies()["jct_s"].mean()) for name, run in runs.items()}
    return {"arm": row.arm, "speed_factor": row.live.speed_factor, "mean_jct_s": means}


def demanded_copies(stats: SchedulerStats) -> int:
    """Return the blocks that were copied because something needed the room or the KV."""
    return stats.num_swapped_out_blocks + stats.num_swapped_in_blocks + stats.num_fetched_blocks


def describe_pairs(pairs: Sequence[Mapping[str, Run]], ours: str, theirs: str) -> dict[str, Any]:
    """Return the ratio of mean JCT of each pair, `ours` over `theirs`, and their median."""
    means = [
        {arm: float(run.times.latencies()["jct_s"].mean()) for arm, run in pair.items()}
        for pair in pairs
    ]
    ratios = [mean[ours] / mean[theirs] for mean in means]
    stats = [pair[ours].stats for pair in pairs]
    return {
        "ratio_of": [ours, theirs],
        "median_ratio": median(ratios),
        "ratios": ratios,
        "mean_jct_s": {arm: [mean[arm] for mean in means] for arm in (ours, theirs)},
        "saved_blocks": sum(each.num_saved_blocks for each in stats),
        "blocks_copied_for_need": sum(map(demanded_copies, stats)),
        "copy_wait_s": sum(each.copy_wait_s for each in stats),
        "preemptions": {
            arm: sum(pair[arm].stats.num_preemptions for pair in pairs) for arm in (ours, theirs)
        },
    }


def as_table(result: Mapping[str, Any]) -> Table:
    """Lay the figures out for people."""
    return _table_of_arms(result) if "arms" in result else _table_of_pairs(result)


def _table_of_arms(result: Mapping[str, Any]) -> Table:
    title = f"{result['load']:g} × what FCFS completes, both runs of each arm"
    seconds = ("JCT mean", "p99", "longest gap", "simulated", "at speed")
    table = Table("arm", *seconds, "swaps", "MB in, out", "waits", title=title)
    for arm in result["arms"]:
        live = (arm["jct_s"]["mean"], arm["jct_s"]["p99"], arm["max_gap_s"]["max"])
        simulated = (arm["simulated"], arm["at_speed"])
        table.add_row(
            arm["arm"],
            *(f"{value:.3f}" for value in live),
            *(f"{each['jct_s']['mean']:.3f} {each['error']:+.0%}" for each in simulated),
            str(arm["num_swaps"]),
            f"{arm['swap_in_bytes'] / 1e6:.0f}, {arm['swap_out_bytes'] / 1e6:.0f}",
            f"{arm['copy_wait_share']:.1%}",
        )
    return table


def _table_of_pairs(result: Mapping[str, Any]) -> Table:
    ratios = result["ratios"]
    table = Table(
        "mean JCT", " / ".join(result["ratio_of"]), title=f"{result['load']:g} × capacity"
    )
    table.add_row("median of pairs", f"{result['median_ratio']:.3f}")
    table.add_row("lowest, highest", f"{min(ratios):.3f}, {max(ratios):.3f}")
    table.add_row("blocks saved ahead of need", str(result["saved_blocks"]))
    table.add_row("blocks copied for need", str(result["blocks_copied_for_need"]))
    return table
