"""E4: input/output ratios of 0.25 to 256, skip-join against FCFS, naive MLFQ and fixed priority.

Prompt and answer lengths are independent lognormals (σ = 1), their means adding up to 512 tokens:
a prompt says nothing about its answer. KV movement is free, so the order of requests is all that
differs.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from experiments.capacity import norm_mean, over_seeds
from experiments.harness import Lab, Result, Setup
from experiments.lengths import LengthSource, drawn
from experiments.sweep import FCFS, NEVER_S, Variant, mlfq, settings, sweep_points
from fastserve.sim.generators import Lognormal

NAME = "e4_input_output"
MEAN_TOKENS = 512
SIGMA = 1.0
RATIOS = (0.25, 1.0, 4.0, 16.0, 64.0, 256.0)
LOADS = (0.8, 1.0, 1.25, 1.5, 2.0)
SETUP = Setup("opt-13b", "a100-40g")
FIXED_PRIORITY = Variant("fixed-priority", "fixed-priority", "ideal")
LIMITS_S = (0.3, NEVER_S)
OURS = tuple(mlfq("skip-join-mlfq", "ideal", limit_s) for limit_s in LIMITS_S)
NAIVE = tuple(mlfq("mlfq", "ideal", limit_s) for limit_s in LIMITS_S)
BASELINES = {
    ours.name: (FCFS, naive, FIXED_PRIORITY) for ours, naive in zip(OURS, NAIVE, strict=True)
}
VARIANTS = (*OURS, *NAIVE, FCFS, FIXED_PRIORITY)
FIGURES = {
    "mean normalized latency": norm_mean,
    "mean JCT": lambda result: float(result.report["jct_s"]["mean"]),
}


def lengths_of(ratio: float) -> LengthSource:
    """Return lengths with this ratio of the mean prompt to the mean answer, before cutting."""
    output = MEAN_TOKENS / (1 + ratio)
    # The mean of a lognormal is its median times exp(σ²/2).
    to_median = 2.718281828459045 ** (-(SIGMA**2) / 2)
    return drawn(
        f"ratio {ratio:g}",
        Lognormal((MEAN_TOKENS - output) * to_median, SIGMA, 1, 2000),
        Lognormal(output * to_median, SIGMA, 1, 2000),
    )


def gains(results: list[Result], ratio: float, load: float) -> dict[str, Any]:
    """Return the latencies of one ratio and load, and those of the baselines over skip-join's."""
    found: dict[str, Any] = {}
    for title, figure in FIGURES.items():
        values = {
            variant.name: over_seeds(
                results, {"ratio": ratio, "load": load, "variant": variant.name}, figure
            )
            for variant in VARIANTS
        }
        found[title] = {
            "seconds": values,
            "gain": {
                ours: {
                    baseline.name: values[baseline.name]["mean"] / values[ours]["mean"]
                    for baseline in baselines
                }
                for ours, baselines in BASELINES.items()
            },
        }
    return found


def picture_of(table: dict[str, Any], ratios: list[float], loads: list[float]) -> Figure:
    """Draw the gain over each baseline, one row per α."""
    picture = Figure(figsize=(13, 7), layout="constrained")
    panels = picture.subplots(len(OURS), 3, sharey=True)
    for row, (ours, baselines) in enumerate(BASELINES.items()):
        for axes, baseline in zip(panels[row], baselines, strict=True):
            for load in loads:
                cells = [table[f"ratio {ratio:g}, load {load:g}"] for ratio in ratios]
                line = [cell["mean JCT"]["gain"][ours][baseline.name] for cell in cells]
                axes.plot(ratios, line, marker=".", label=f"load {load:g}")
            axes.axhline(1.0, color="grey", linestyle="--", linewidth=1)
            axes.set_xscale("log", base=4)
            axes.set_yscale("log", base=2)
            axes.set_title(f"{baseline.name} over {ours}", fontsize=9)
            axes.set_xlabel("input/output")
            axes.set_ylabel("mean JCT, ratio")
            axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    return picture


def run(lab: Lab) -> None:
    """Run each ratio at a few loads."""
    ratios, loads = lab.some(RATIOS), lab.some(LOADS)
    sources = [lengths_of(ratio) for ratio in ratios]
    points = [
        point
        for ratio, source in zip(ratios, sources, strict=True)
        for point in sweep_points(
            lab, SETUP, source, VARIANTS, labels={"ratio": ratio}, loads=LOADS
        )
    ]  # fmt: skip
    results = lab.run(NAME, points)
    table = {
        f"ratio {ratio:g}, load {load:g}": gains(results, ratio, load)
        for ratio in ratios
        for load in loads
    }
    lab.save(
        NAME,
        settings=settings(lab, {"opt-13b": SETUP}, sources, VARIANTS),
        figures=table,
        picture=picture_of(table, ratios, loads),
    )
