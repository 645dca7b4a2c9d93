"""Figures over seeds, and capacity: the rate at which a latency crosses its limit.

Rules: capacity is found for each seed and then averaged; what does not exist is NaN.
Must not know: how points are run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from experiments.harness import Labels, Result

SLO_S = 0.3
"""Seconds per output token: the normalized latency at which the paper reads off capacity."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean, standard deviation and number of repetitions."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return {"mean": math.nan, "std": math.nan, "n": 0}
    std = float(np.std(known, ddof=1)) if len(known) > 1 else 0.0
    return {"mean": float(np.mean(known)), "std": std, "n": len(known)}


def over_seeds(
    results: Sequence[Result], labels: Labels, figure: Callable[[Result], float]
) -> dict[str, float]:
    """Return the spread of a figure over the points with these labels."""
    return spread([figure(result) for result in results if result.matches(labels)])


def norm_mean(result: Result) -> float:
    """Return the mean normalized latency, in s/token."""
    return float(result.report["normalized_latency_s"]["mean"])


def norm_p95(result: Result) -> float:
    """Return the P95 normalized latency, in s/token."""
    return float(result.report["normalized_latency_s"]["p95"])


def crossing(rates: Sequence[float], values: Sequence[float], limit: float = SLO_S) -> float:
    """Return the rate at which values first exceed the limit, between the points on a log scale.

    NaN if they do so from the first rate on, or at none.
    """
    if values[0] > limit:
        return math.nan
    pairs = list(zip(rates, values, strict=True))
    for (low, below), (high, above) in itertools.pairwise(pairs):
        if above > limit:
            share = math.log(limit / below) / math.log(above / below)
            return low + share * (high - low)
    return math.nan


def capacities(
    results: Sequence[Result],
    labels: Labels,
    figure: Callable[[Result], float],
    limit: float = SLO_S,
) -> dict[str, float]:
    """Return capacity, in requests/s, over the seeds of the points with these labels."""
    mine = [result for result in results if result.matches(labels)]
    found = []
    for seed in sorted({result.labels["seed"] for result in mine}, key=str):
        curve = sorted((float(result.labels["rate"]), figure(result)) for result in mine
                       if result.labels["seed"] == seed)  # fmt: skip
        found.append(crossing([rate for rate, _ in curve], [value for _, value in curve], limit))
    return spread(found)
