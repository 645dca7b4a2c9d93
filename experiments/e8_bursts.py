"""E8: bursts (CV of the gaps 1 to 8), the starvation limit α, and how much KV is alive.

OPT-13B on A100-40G, ShareGPT lengths, load 0.8. On a free link live KV is not cut short; the other
modes with α = 0.3 s and without promotion show what a real one makes of bursts.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from experiments.capacity import over_seeds
from experiments.harness import Lab, Result, Setup
from experiments.jct import all_gains, along, counted, draw
from experiments.lengths import named_lengths
from experiments.moved import moved
from experiments.sweep import NEVER_S, Variant, mlfq, settings, sweep_points

NAME = "e8_bursts"
NUM_REQUESTS = 500
LENGTHS = "sharegpt"
SETUP = Setup("opt-13b", "a100-40g")
LOADS = (0.8,)
CVS = (1.0, 2.0, 4.0, 8.0)
ALPHAS = (0.3, 1.0, 3.0, 10.0, 30.0, NEVER_S)
FIRST = Variant("fcfs, ideal", "fcfs", "ideal")
MLFQS = tuple(mlfq("skip-join-mlfq", "ideal", alpha) for alpha in ALPHAS)
REAL = tuple(
    mlfq("skip-join-mlfq", mode, alpha)
    for alpha in (0.3, NEVER_S)
    for mode in ("recompute", "reactive", "proactive")
)
PEAK = counted("peak_live_blocks")
VARIANTS = (FIRST, *MLFQS, *REAL, Variant("srpt, ideal", "srpt", "ideal"))


def live_kv(results: list[Result], load: float) -> dict[str, Any]:
    """Return peak live KV and requests by variant and CV, and over those of FCFS."""
    found: dict[str, Any] = {}
    for variant in VARIANTS:
        rows = []
        for cv in sorted({result.labels["cv"] for result in results}, key=float):
            at = {"load": load, "cv": cv}
            blocks = over_seeds(results, at | {"variant": variant.name}, PEAK)
            base = over_seeds(results, at | {"variant": FIRST.name}, PEAK)
            live = over_seeds(
                results, at | {"variant": variant.name}, counted("peak_live_requests")
            )
            rows.append({
                "cv": cv, "peak_blocks": blocks, "over_fcfs": blocks["mean"] / base["mean"],
                "peak_live_requests": live,
                "moved": moved(results, at | {"variant": variant.name}),
            })  # fmt: skip
        found[variant.name] = rows
    return found


def run(lab: Lab) -> None:
    """Sweep CV and α together."""
    source = named_lengths(LENGTHS, lab.traces)
    points = [
        point
        for cv in lab.some(CVS)
        for point in sweep_points(
            lab, SETUP, source, VARIANTS, num_requests=NUM_REQUESTS, loads=LOADS, cv=cv,
            labels={"cv": cv},
        )
    ]  # fmt: skip
    results = lab.run(NAME, points)
    figures: dict[str, Any] = {}
    picture = Figure(figsize=(15, 4.5), layout="constrained")
    panels = picture.subplots(len(LOADS), 3, squeeze=False)
    for row, load in enumerate(LOADS):
        table = along(results, {"load": load}, VARIANTS, "cv")
        kept = live_kv(results, load)
        figures[f"load {load:g}"] = {
            "jct_s": table,
            "gains": all_gains(table, "cv", (FIRST,), (*MLFQS, *REAL)),
            "live_kv": kept,
        }
        for column, part in enumerate(("mean", "p99")):
            draw(panels[row][column], table, "cv", part, f"load {load:g}: {part}")
        for name, rows in kept.items():
            panels[row][2].plot([item["cv"] for item in rows], [item["over_fcfs"] for item in rows],
                                marker=".", label=name)  # fmt: skip
        panels[row][2].set_title(f"load {load:g}: peak live KV over that of FCFS", fontsize=9)
        panels[row][2].set_xlabel("cv", fontsize=8)
        panels[row][2].grid(alpha=0.3)
    panels[0][0].legend(fontsize=7)
    lab.save(
        NAME,
        settings=settings(lab, {"opt-13b": SETUP}, [source], VARIANTS, NUM_REQUESTS)
        | {"arrivals": "Gamma, CV as stated, redrawn per seed"},
        figures=figures,
        picture=picture,
    )
