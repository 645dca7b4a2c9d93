"""E7, second part: skip-join against naive MLFQ where prompts are long and answers short.

GPT-3 13B, without starvation limit and with the paper's, batch caps 1 and 16, a free link.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from experiments.harness import Lab, Setup
from experiments.jct import all_gains, along, draw
from experiments.lengths import drawn
from experiments.sweep import FCFS, NEVER_S, PAPER, SRPT, mlfq, settings, sweep_points
from fastserve.sim.generators import Zipf

NAME = "e7_skip_join"
NUM_REQUESTS = 400
SETUPS = {f"cap {cap}": Setup("gpt-3-13b", "a100-40g", max_num_seqs=cap) for cap in (1, 16)}
LENGTHS = {
    "answers to 4": drawn("answers to 4", Zipf(0.9, 1, 1984), Zipf(0.9, 1, 4)),
    "answers to 16": drawn("answers to 16", Zipf(0.9, 1, 1984), Zipf(0.9, 1, 16)),
    "answers to 64": drawn("answers to 64", Zipf(0.9, 1, 1984), Zipf(0.9, 1, 64)),
}
NAIVE, NAIVE_BOUND = mlfq("mlfq", "ideal", 0.3), mlfq("mlfq", "ideal", NEVER_S)
BOUND = mlfq("skip-join-mlfq", "ideal", NEVER_S)
VARIANTS = (FCFS, NAIVE, PAPER, NAIVE_BOUND, BOUND, SRPT)
LOADS = (0.6, 0.8, 0.9, 1.0, 1.5)
CV = 2.0


def run(lab: Lab) -> None:
    """Sweep rates for each cap and length of answer."""
    points = [
        point
        for name, setup in SETUPS.items()
        for source in LENGTHS.values()
        for point in sweep_points(
            lab, setup, source, VARIANTS, num_requests=NUM_REQUESTS, loads=LOADS, cv=CV,
            labels={"setup": name, "lengths": source.name},
        )
    ]  # fmt: skip
    results = lab.run(NAME, points)
    figures: dict[str, Any] = {}
    picture = Figure(figsize=(13, 7), layout="constrained")
    panels = picture.subplots(len(SETUPS), len(LENGTHS))
    for row, setup in enumerate(SETUPS):
        for column, lengths in enumerate(LENGTHS):
            table = along(results, {"setup": setup, "lengths": lengths}, VARIANTS, "load")
            figures[f"{setup}, {lengths}"] = {
                "jct_s": table,
                "gains α=0.3": all_gains(table, "load", (NAIVE,), (PAPER,)),
                "gains α=∞": all_gains(table, "load", (NAIVE_BOUND,), (BOUND,)),
            }
            draw(panels[row][column], table, "load", "mean", f"{setup}, {lengths}: mean")
    panels[0][0].legend(fontsize=7)
    lab.save(
        NAME,
        settings=settings(lab, SETUPS, list(LENGTHS.values()), VARIANTS, NUM_REQUESTS)
        | {"arrivals": f"Gamma, CV {CV}, redrawn per seed"},
        figures=figures,
        picture=picture,
    )
