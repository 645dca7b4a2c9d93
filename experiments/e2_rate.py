"""E2: mean and P95 s/token against rate, ShareGPT and Alpaca lengths, OPT-13B/66B/175B, cap 16.

Capacity is the rate at which the figure crosses 0.3 s/token. All requests are counted, so in
overload it depends on how long they arrive: the second part repeats OPT-13B for other durations.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from experiments.harness import Lab, Point, Setup
from experiments.lengths import named_lengths
from experiments.sweep import (
    DURATION_S,
    FASTSERVE_POLICIES,
    FCFS,
    LOADS,
    NEVER,
    PAPER,
    Variant,
    capacity_table,
    draw,
    settings,
    sweep_points,
)

NAME = "e2_rate"
SETUPS = {
    "opt-13b": Setup("opt-13b", "a100-40g"),
    "opt-66b": Setup("opt-66b", "a100-40g", tensor_parallel_size=4),
    "opt-175b": Setup("opt-175b", "a100-40g", tensor_parallel_size=8, pipeline_parallel_size=2),
}
LENGTHS = ("sharegpt", "alpaca")
OTHER_DURATIONS_S = (30.0, 60.0, 300.0)
SHORT_LOADS = LOADS[:5]
FIGURES = {"mean_s_per_token": "mean", "p95_s_per_token": "P95"}


def variants_of(setup: str) -> tuple[Variant, ...]:
    """Return the policies that a model is run under: the smallest has them all."""
    return FASTSERVE_POLICIES if setup == "opt-13b" else (FCFS, PAPER, NEVER)


def points(lab: Lab, setup: str, lengths: str) -> list[Point]:
    """Return the sweep of one model and one kind of lengths."""
    source = named_lengths(lengths, lab.traces)
    labels = {"setup": setup, "lengths": lengths}
    return sweep_points(lab, SETUPS[setup], source, variants_of(setup), labels=labels)


def by_duration(lab: Lab) -> dict[str, Any]:
    """Return the capacities of OPT-13B when requests arrive for a shorter and a longer time."""
    variants = (FCFS, PAPER)
    runs = [(lengths, seconds) for lengths in LENGTHS for seconds in lab.some(OTHER_DURATIONS_S, 1)]
    points = [
        point
        for lengths, seconds in runs
        for point in sweep_points(
            lab, SETUPS["opt-13b"], named_lengths(lengths, lab.traces), variants,
            labels={"lengths": lengths, "duration_s": seconds}, duration_s=seconds,
            loads=LOADS if seconds < DURATION_S else SHORT_LOADS,
        )
    ]  # fmt: skip
    results = lab.run(f"{NAME}: other durations", points)
    found: dict[str, Any] = {}
    for lengths, seconds in runs:
        labels = {"lengths": lengths, "duration_s": seconds}
        table = capacity_table(results, labels, variants)
        found[f"{lengths}, {seconds:g} s"] = {
            name: {key: value for key, value in row.items() if key.startswith("capacity")}
            for name, row in table.items()
        }
    return found


def run(lab: Lab) -> None:
    """Sweep rates for each model and kind of lengths."""
    pairs = [(setup, lengths) for setup in SETUPS for lengths in LENGTHS]
    results = lab.run(NAME, [point for pair in pairs for point in points(lab, *pair)])
    figures: dict[str, Any] = {}
    picture = Figure(figsize=(15, 13), layout="constrained")
    panels = picture.subplots(4, 3)
    for setup, lengths in pairs:
        labels = {"setup": setup, "lengths": lengths}
        table = capacity_table(results, labels, variants_of(setup))
        figures[f"{setup}, {lengths}"] = table
        for row, (which, title) in enumerate(FIGURES.items()):
            axes = panels[2 * LENGTHS.index(lengths) + row][list(SETUPS).index(setup)]
            draw(axes, table, which, f"{setup}, {lengths}: {title}")
    panels[0][0].legend(fontsize=7)
    sources = [named_lengths(lengths, lab.traces) for lengths in LENGTHS]
    lab.save(
        NAME,
        settings=settings(lab, SETUPS, sources, FASTSERVE_POLICIES),
        figures=figures | {"by duration": by_duration(lab)},
        picture=picture,
    )
