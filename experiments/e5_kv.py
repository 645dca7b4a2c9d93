"""E5: what becomes of preempted KV, by each mode there is.

Newcomers deferred; recomputation within a budget of a tenth of device time, or without one (∞), the
paper's rule; copied to the host when its place is needed and back when it is to run (reactive);
back ahead of need (prefetch); both ahead of need (proactive); a link of zero seconds (ideal).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from experiments.e2_rate import SETUPS
from experiments.harness import Lab, Result
from experiments.lengths import named_lengths
from experiments.moved import moved
from experiments.sweep import (
    COLORS,
    FCFS,
    NEVER_S,
    capacity_table,
    draw,
    mlfq,
    settings,
    sweep_points,
)

NAME = "e5_kv"
LENGTHS = "sharegpt"
LOADS = (0.8, 1.0, 1.25, 1.5, 2.0)
MODES = (
    "defer",
    "recompute",
    "recompute ∞",
    "reactive",
    "write-through",
    "prefetch",
    "proactive",
    "ideal",
)
VARIANTS = (
    FCFS,
    *(mlfq("skip-join-mlfq", mode, limit_s) for limit_s in (0.3, NEVER_S) for mode in MODES),
)


def over_ideal(table: dict[str, Any]) -> dict[str, Any]:
    """Return, by α and mode, the mean latency over that of the free link, rate by rate."""
    found: dict[str, Any] = {}
    for variant in VARIANTS[1:]:
        ideal = variant.name.rpartition(", ")[0] + ", ideal"
        line, bound = (table[name]["mean_s_per_token"] for name in (variant.name, ideal))
        pairs = zip(line["rates"], line["mean"], bound["mean"], strict=True)
        found[variant.name] = {f"{rate:.4g}": value / least for rate, value, least in pairs}
    return found


def moved_by_load(lab: Lab, results: Sequence[Result]) -> dict[str, Any]:
    """Return bytes, stalls and gaps by variant and load."""
    return {
        variant.name: {
            f"{load:g}": moved(results, {"variant": variant.name, "load": load})
            for load in lab.some(LOADS)
        }
        for variant in VARIANTS
    }


def run(lab: Lab) -> None:
    """Sweep rates for each mode and α on OPT-13B, whose KV pool is the smallest."""
    setup = SETUPS["opt-13b"]
    source = named_lengths(LENGTHS, lab.traces)
    labels = {"setup": "opt-13b", "lengths": LENGTHS}
    points = sweep_points(lab, setup, source, VARIANTS, labels=labels, loads=LOADS)
    results = lab.run(NAME, points)
    table = capacity_table(results, labels, VARIANTS)
    ratios = over_ideal(table)
    picture = Figure(figsize=(12, 4.5), layout="constrained")
    latency, ratio = picture.subplots(1, 2)
    draw(latency, table, "mean_s_per_token", f"opt-13b on a100-40g, {LENGTHS}: mean")
    latency.legend(fontsize=7)
    for index, (name, line) in enumerate(ratios.items(), start=1):
        color = COLORS.get(name, colormaps["tab20b"](2 * index))
        rates = [float(rate) for rate in line]
        ratio.plot(rates, list(line.values()), label=name, color=color, marker=".")
    ratio.set_title("mean s/token over that of the free link, same α", fontsize=9)
    ratio.set_xlabel("requests/s", fontsize=8)
    ratio.set_yscale("log")
    ratio.grid(alpha=0.3)
    lab.save(
        NAME,
        settings=settings(lab, {"opt-13b": setup}, [source], VARIANTS),
        figures=table | {"over the free link": ratios, "moved": moved_by_load(lab, results)},
        picture=picture,
    )
