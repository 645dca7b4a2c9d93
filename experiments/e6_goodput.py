"""E6: goodput: the rate at which 90 % of requests take at most 5, 10, 20 × their time alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.capacity import capacities
from experiments.e2_rate import LENGTHS, SETUPS, points
from experiments.harness import Lab, Result
from experiments.lengths import named_lengths
from experiments.sweep import FASTSERVE_POLICIES, curve, settings

NAME = "e6_goodput"
SETUP = "opt-13b"
MULTIPLES = (5.0, 10.0, 20.0)
ATTAINMENT = 0.9


def over(multiple: float) -> Callable[[Result], float]:
    """Return a figure that exceeds 1 where too few requests keep the objective."""

    def figure(result: Result) -> float:
        return float(np.quantile(result.rows["slowdown"], ATTAINMENT)) / multiple

    return figure


def within(multiple: float) -> Callable[[Result], float]:
    """Return the figure: share of requests that keep the objective."""
    return lambda result: result.share_within(multiple)


def run(lab: Lab) -> None:
    """Read goodput off the points of E2."""
    results = lab.run(NAME, [point for name in LENGTHS for point in points(lab, SETUP, name)])
    figures: dict[str, Any] = {}
    picture = Figure(figsize=(13, 7), layout="constrained")
    panels = picture.subplots(len(LENGTHS), len(MULTIPLES))
    for row, lengths in enumerate(LENGTHS):
        for column, multiple in enumerate(MULTIPLES):
            axes = panels[row][column]
            table: dict[str, Any] = {}
            for variant in FASTSERVE_POLICIES:
                labels = {"setup": SETUP, "lengths": lengths, "variant": variant.name}
                line = curve(results, labels, within(multiple))
                goodput = capacities(results, labels, over(multiple), limit=1.0)
                table[variant.name] = {"goodput": goodput, "share_within": line}
                axes.errorbar(line["rates"], line["mean"], line["std"], label=variant.name,
                              marker=".", capsize=2)  # fmt: skip
            first = table["fcfs"]["goodput"]["mean"]
            for cells in table.values():
                cells["gain"] = cells["goodput"]["mean"] / first
            figures[f"{lengths}, {multiple:g}x"] = table
            axes.axhline(ATTAINMENT, color="grey", linestyle="--", linewidth=1)
            axes.set_title(f"{lengths}: within {multiple:g} × alone", fontsize=9)
            axes.set_xlabel("requests/s")
            axes.set_ylabel("share of requests")
            axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=7)
    sources = [named_lengths(lengths, lab.traces) for lengths in LENGTHS]
    lab.save(
        NAME,
        settings=settings(lab, {SETUP: SETUPS[SETUP]}, sources, FASTSERVE_POLICIES)
        | {"attainment": ATTAINMENT, "objective": "multiples of the JCT of the request alone"},
        figures=figures,
        picture=picture,
    )
