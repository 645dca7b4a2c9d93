"""E11: grouped-query attention: Llama-3-8B, whose KV is a quarter, beside Llama-2-7B.

One A100-40G each, ShareGPT lengths, caps 16 and 64.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from experiments.capacity import over_seeds
from experiments.harness import Lab, Setup
from experiments.jct import counted
from experiments.lengths import named_lengths
from experiments.sweep import FCFS, PAPER, RECOMPUTE, capacity_table, draw, settings, sweep_points

NAME = "e11_gqa"
NUM_REQUESTS = 400
LENGTHS = "sharegpt"
SETUPS = {
    f"{model}, cap {cap}": Setup(model, "a100-40g", max_num_seqs=cap)
    for model in ("llama-3-8b", "llama-2-7b")
    for cap in (16, 64)
}
VARIANTS = (FCFS, PAPER, RECOMPUTE)
LOADS = (1.0, 1.5, 2.0, 3.0, 5.0)


def run(lab: Lab) -> None:
    """Sweep rates for both models."""
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
    picture = Figure(figsize=(16, 4), layout="constrained")
    for axes, (name, setup) in zip(picture.subplots(1, len(SETUPS)), SETUPS.items(), strict=True):
        table = capacity_table(results, {"setup": name}, VARIANTS)
        blocks = setup.machine().num_device_blocks
        used = {
            variant.name: [
                over_seeds(results, {"setup": name, "variant": variant.name, "load": load},
                           counted("peak_device_blocks"))["mean"] / blocks
                for load in lab.some(LOADS)
            ]
            for variant in VARIANTS
        }  # fmt: skip
        figures[name] = {"capacity": table, "kv_tokens": blocks * 16, "peak_share_of_pool": used}
        draw(axes, table, "mean_s_per_token", f"{name}: mean")
    axes.legend(fontsize=7)
    lab.save(
        NAME,
        settings=settings(lab, SETUPS, [source], VARIANTS, NUM_REQUESTS),
        figures=figures,
        picture=picture,
    )
