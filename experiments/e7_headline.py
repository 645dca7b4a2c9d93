"""E7: mean and tail JCT, Zipf lengths, Gamma arrivals: GPT-3 13B and 175B against Orca and static.

Rate, burstiness (CV of the gaps) and skew (θ of both lengths) are swept one at a time around load
0.8, CV 2, θ 0.9. Orca and static batching reserve KV for prompt + 1,024 tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.harness import Lab, Point, Setup
from experiments.jct import all_gains, along, draw
from experiments.lengths import LengthSource, drawn
from experiments.sweep import (
    FCFS,
    NEVER,
    NEVER_S,
    PAPER,
    SRPT,
    Variant,
    mlfq,
    settings,
    sweep_points,
)
from fastserve.sim.generators import Zipf

NAME = "e7_headline"
NUM_REQUESTS = 400
LONGEST = 1024
SETUPS = {
    "gpt-3-13b": Setup("gpt-3-13b", "a100-40g"),
    "gpt-3-175b": Setup("gpt-3-175b", "a100-40g", tensor_parallel_size=8, pipeline_parallel_size=2),
}
ORCA, STATIC = Variant("orca", "orca"), Variant("static", "static")
NAIVE = mlfq("mlfq", "ideal", 0.3)
BOUND = mlfq("skip-join-mlfq", "ideal", NEVER_S)
BASES = (STATIC, ORCA, FCFS, NAIVE)
OURS = (PAPER, BOUND, NEVER)
VARIANTS = (*BASES, *OURS, SRPT)
LOADS = (0.5, 0.8, 1.0, 1.25, 1.5)
LOAD, CV, THETA = 0.8, 2.0, 0.9
CVS = (1.0, 2.0, 4.0, 8.0)
THETAS = (0.0, 0.5, 0.9, 1.3, 1.6)


def zipf(theta: float) -> LengthSource:
    """Return prompts and answers of 1 to 1,024 tokens."""
    lengths = Zipf(theta, 1, LONGEST)
    return drawn(f"zipf {theta:g}", lengths, lengths)


def sweep(
    lab: Lab, setup: str, *, by: str, loads: Sequence[float], cv: float = CV, theta: float = THETA
) -> list[Point]:
    """Return the points of one line; clients ask for at most 1,024 tokens."""
    found = sweep_points(
        lab, SETUPS[setup], zipf(theta), VARIANTS, num_requests=NUM_REQUESTS, loads=loads, cv=cv,
        labels={"setup": setup, "by": by, "cv": cv, "theta": theta},
    )  # fmt: skip
    return [dataclasses.replace(point, workload=dataclasses.replace(
                point.workload, max_tokens=np.full(len(point.workload), LONGEST)))
            for point in found]  # fmt: skip


def run(lab: Lab) -> None:
    """Sweep rate on both models, CV and θ on the smaller."""
    points = [point for setup in SETUPS for point in sweep(lab, setup, by="load", loads=LOADS)]
    for cv in lab.some(CVS):
        points += sweep(lab, "gpt-3-13b", by="cv", loads=(LOAD,), cv=cv)
    for theta in lab.some(THETAS):
        points += sweep(lab, "gpt-3-13b", by="theta", loads=(LOAD,), theta=theta)
    results = lab.run(NAME, points)
    figures: dict[str, Any] = {}
    picture = Figure(figsize=(15, 7), layout="constrained")
    panels = picture.subplots(2, 4)
    lines = [("gpt-3-13b", "load"), ("gpt-3-175b", "load"), ("gpt-3-13b", "cv"),
             ("gpt-3-13b", "theta")]  # fmt: skip
    for column, (setup, by) in enumerate(lines):
        table = along(results, {"setup": setup, "by": by}, VARIANTS, by)
        figures[f"{setup} by {by}"] = {
            "jct_s": table, "gains": all_gains(table, by, BASES, OURS)
        }  # fmt: skip
        for row, part in enumerate(("mean", "p99")):
            draw(panels[row][column], table, by, part, f"{setup} by {by}: {part}")
    panels[0][0].legend(fontsize=6)
    sources = [zipf(theta) for theta in THETAS]
    lab.save(
        NAME,
        settings=settings(lab, SETUPS, sources, VARIANTS, NUM_REQUESTS)
        | {"arrivals": f"Gamma, CV {CV} unless swept, redrawn per seed", "theta": THETA,
           "load": f"{LOAD} unless swept, of the saturation below", "max_tokens": LONGEST},
        figures=figures,
        picture=picture,
    )  # fmt: skip
