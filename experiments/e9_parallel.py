"""E9: the gain over FCFS by layout, tensor × pipeline parallel, ShareGPT lengths, cap 16.

Loads are shares of each layout's own saturation. OPT-13B fits every layout; OPT-66B needs four
devices or more.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from experiments.harness import Lab, Setup
from experiments.jct import all_gains, along
from experiments.lengths import named_lengths
from experiments.sweep import (
    FCFS,
    PAPER,
    capacity_table,
    draw,
    saturation,
    settings,
    sweep_points,
)

NAME = "e9_parallel"
NUM_REQUESTS = 300
LENGTHS = "sharegpt"
LAYOUTS = {
    "opt-13b": ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)),
    "opt-66b": ((4, 1), (8, 1), (4, 2), (2, 4)),
}
SETUPS = {
    f"{model} {ranks}×{stages}": Setup(
        model, "a100-40g", tensor_parallel_size=ranks, pipeline_parallel_size=stages
    )
    for model, layouts in LAYOUTS.items()
    for ranks, stages in layouts
}
VARIANTS = (FCFS, PAPER)
LOADS = (1.0, 1.5, 2.0, 3.0, 5.0)


def run(lab: Lab) -> None:
    """Sweep rates for each layout."""
    source = named_lengths(LENGTHS, lab.traces)
    points = [
        point
        for name, setup in SETUPS.items()
        for point in sweep_points(
            lab, setup, source, VARIANTS, num_requests=NUM_REQUESTS, loads=LOADS,
            labels={"setup": name},
        )
    ]  # fmt: skip
    results = lab.run(NAME, points)
    figures: dict[str, Any] = {}
    picture = Figure(figsize=(16, 7), layout="constrained")
    panels = picture.subplots(2, 5).ravel()
    for axes, (name, setup) in zip(panels, SETUPS.items(), strict=True):
        table = capacity_table(results, {"setup": name}, VARIANTS)
        times = along(results, {"setup": name}, VARIANTS, "load")
        figures[name] = {
            "capacity": table,
            "saturation_requests_per_s": saturation(setup, source),
            "kv_tokens": setup.machine().num_device_blocks * 16,
            "gains": all_gains(times, "load", (FCFS,), (PAPER,)),
        }
        draw(axes, table, "mean_s_per_token", f"{name} (tensor × pipeline)")
    panels[0].legend(fontsize=7)
    lab.save(
        NAME,
        settings=settings(lab, SETUPS, [source], VARIANTS, NUM_REQUESTS),
        figures=figures,
        picture=picture,
    )
