"""The figures of live runs beside those that the simulator predicts, and a table.

Rules: plain arithmetic. Runs of equal labels are taken together: requests of all of them count
alike. An error is the simulator's mean JCT over the live one, less one. Must not know: engines,
files, how the runs came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from fastserve.sim.measures import Times, summary

MEASURES = ("jct_s", "ttft_s", "tpot_s")
PREDICTIONS = ("simulated", "at_speed")


class Row(NamedTuple):
    """One live run, the same simulated, and simulated at the speed of its own steps."""

    labels: Mapping[str, str]
    live: Times
    simulated: Times
    at_speed: Times
    speed_factor: float  # seconds that steps took over those predicted for them


def latencies(runs: Sequence[Times]) -> dict[str, dict[str, Any]]:
    """Return a summary of each measure over the requests of all runs."""
    tables = [run.latencies() for run in runs]
    return {name: summary(np.concatenate([table[name] for table in tables])) for name in MEASURES}


def describe(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the figures of one run, or of several taken together."""
    live = latencies([row.live for row in rows])
    found: dict[str, Any] = {
        **rows[0].labels,
        "requests": sum(len(row.live.arrived_at) for row in rows),
        **live,
        "speed_factor": float(np.mean([row.speed_factor for row in rows])),
    }
    for name in PREDICTIONS:
        by_name = latencies([getattr(row, name) for row in rows])
        found[name] = {**by_name, "error": by_name["jct_s"]["mean"] / live["jct_s"]["mean"] - 1}
    return found


def together(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the figures of all runs of each set of labels, in the order of the first ones."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.labels.values()), []).append(row)
    return [describe(group) for group in groups.values()]


def as_table(entries: Sequence[Mapping[str, Any]], labels: Sequence[str], title: str) -> Table:
    """Lay figures out for people; `labels` name the first columns."""
    table = Table(*labels, "requests", "JCT mean", "p99", *PREDICTIONS, "speed factor", title=title)
    for each in entries:
        table.add_row(
            *(each[name] for name in labels),
            str(each["requests"]),
            *(f"{each['jct_s'][part]:.3f}" for part in ("mean", "p99")),
            *(
                f"{each[name]['jct_s']['mean']:.3f} {each[name]['error']:+.1%}"
                for name in PREDICTIONS
            ),
            f"{each['speed_factor']:.3f}",
        )
    return table
