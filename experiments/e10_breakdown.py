"""E10: where the time of a request goes by rate: its turn, its KV, or executing.

OPT-13B on A100-40G, ShareGPT lengths. Swapping is the time in which a request could have run but
for KV that was not on the device; what recomputing costs is counted as execution.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from experiments.capacity import over_seeds
from experiments.harness import Lab, Result, Setup
from experiments.lengths import named_lengths
from experiments.sweep import (
    FCFS,
    NEVER_S,
    mlfq,
    settings,
    sweep_points,
)

NAME = "e10_breakdown"
NUM_REQUESTS = 500
LENGTHS = "sharegpt"
SETUP = Setup("opt-13b", "a100-40g")
MODES = ("defer", "recompute", "reactive", "write-through", "prefetch", "proactive", "ideal")
VARIANTS = (
    FCFS,
    *(mlfq("skip-join-mlfq", mode, 0.3) for mode in MODES),
    *(mlfq("skip-join-mlfq", mode, NEVER_S) for mode in ("recompute", "proactive")),
)
PARTS = ("execute", "queue", "swap")
LOADS = (0.5, 0.8, 1.0, 1.25, 1.5, 2.0)


def part(name: str) -> Any:
    """Return the figure: one part of the mean JCT."""

    def figure(result: Result) -> float:
        return float(result.report["breakdown_s"][name])

    return figure


def run(lab: Lab) -> None:
    """Sweep rates and take the mean JCT apart."""
    source = named_lengths(LENGTHS, lab.traces)
    results = lab.run(
        NAME,
        sweep_points(lab, SETUP, source, VARIANTS, num_requests=NUM_REQUESTS, loads=LOADS,
                     labels={"setup": "opt-13b"}),
    )  # fmt: skip
    loads = lab.some(LOADS)
    figures: dict[str, Any] = {}
    picture = Figure(figsize=(22, 3.8), layout="constrained")
    for axes, variant in zip(picture.subplots(1, len(VARIANTS)), VARIANTS, strict=True):
        rows = []
        for load in loads:
            at = {"variant": variant.name, "load": load}
            row = {name: over_seeds(results, at, part(name)) for name in PARTS}
            total = sum(value["mean"] for value in row.values())
            shares = {f"{name}_share": row[name]["mean"] / total for name in ("queue", "swap")}
            rows.append({"load": load, **row, **shares})
        figures[variant.name] = rows
        places, bottom = range(len(loads)), [0.0] * len(loads)
        for name in PARTS:
            heights = [row[name]["mean"] for row in rows]
            axes.bar(places, heights, bottom=bottom, yerr=[row[name]["std"] for row in rows],
                     label=name)  # fmt: skip
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
        axes.set_xticks(places, [f"{load:g}" for load in loads])
        axes.set_title(variant.name, fontsize=8)
        axes.set_xlabel("load", fontsize=8)
        axes.set_ylabel("mean JCT, s", fontsize=8)
        axes.legend(fontsize=7)
    lab.save(
        NAME,
        settings=settings(lab, {"opt-13b": SETUP}, [source], VARIANTS, NUM_REQUESTS),
        figures=figures,
        picture=picture,
    )
