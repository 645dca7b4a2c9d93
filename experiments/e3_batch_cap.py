"""E3: what larger batch caps leave of the gain: OPT-13B, caps 16 to 256.

The KV pool of an A100-40G never fills a batch of 64, so larger caps change nothing there; the
A100-80G shows what they do where memory allows.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from experiments.harness import Lab, Setup
from experiments.lengths import named_lengths
from experiments.sweep import FCFS, PAPER, capacity_table, draw, settings, sweep_points

NAME = "e3_batch_cap"
CAPS = {"a100-40g": (16, 64), "a100-80g": (64, 128, 256)}
SETUPS = {
    f"{hardware}, cap {cap}": Setup("opt-13b", hardware, max_num_seqs=cap)
    for hardware, caps in CAPS.items()
    for cap in caps
}
LENGTHS = "sharegpt"
VARIANTS = (FCFS, PAPER)
LOADS = (1.0, 1.25, 1.5, 2.0, 2.5)


def run(lab: Lab) -> None:
    """Sweep rates for each cap, on a small and a large KV pool."""
    source = named_lengths(LENGTHS, lab.traces)
    points = [
        point
        for name, setup in SETUPS.items()
        for point in sweep_points(
            lab, setup, source, VARIANTS, labels={"setup": name}, loads=LOADS
        )
    ]  # fmt: skip
    results = lab.run(NAME, points)
    figures: dict[str, Any] = {}
    picture = Figure(figsize=(14, 7), layout="constrained")
    panels = picture.subplots(2, 3).flat
    for axes, name in zip(panels, SETUPS, strict=False):
        figures[name] = capacity_table(results, {"setup": name}, VARIANTS)
        draw(axes, figures[name], "mean_s_per_token", f"{name}: mean")
        axes.legend(fontsize=7)
    picture.axes[-1].set_axis_off()
    lab.save(
        NAME,
        settings=settings(lab, SETUPS, [source], VARIANTS),
        figures=figures,
        picture=picture,
    )
