"""Rate sweeps: the same traffic under several policies, from light load to overload.

Rules: rates are multiples of the rate at which the machine saturates, worked out from costs and
mean lengths alone, so no grid is chosen by its outcome. Must not know: which experiment it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes

from experiments.harness import (
    SLO_S,
    Lab,
    Labels,
    Point,
    Result,
    Setup,
    capacities,
    norm_mean,
    norm_p95,
    over_seeds,
)
from experiments.lengths import LengthSource

LOADS = (0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0)
NEVER_S = 1e9


@dataclass(frozen=True, slots=True)
class Variant:
    """A policy with its settings, under the name that figures have."""

    name: str
    policy: str
    mode: str = "recompute"
    changes: Mapping[str, Any] = field(default_factory=dict)


FCFS = Variant("fcfs", "fcfs")
SKIP_JOIN = Variant("skip-join α=0.3", "skip-join-mlfq", changes={"starvation_limit": 0.3})
SKIP_JOIN_3 = Variant("skip-join α=3", "skip-join-mlfq", changes={"starvation_limit": 3.0})
SKIP_JOIN_NEVER = Variant("skip-join α=∞", "skip-join-mlfq", changes={"starvation_limit": NEVER_S})
SRPT = Variant("srpt", "srpt")
NAIVE = Variant("mlfq α=0.3", "mlfq", changes={"starvation_limit": 0.3})
NAIVE_NEVER = Variant("mlfq α=∞", "mlfq", changes={"starvation_limit": NEVER_S})
FIXED_PRIORITY = Variant("fixed-priority", "fixed-priority")


def saturation(setup: Setup, lengths: LengthSource) -> float:
    """Return the rate that keeps every batch full: requests/s, from mean lengths and costs.

    As many requests as the cap and the KV pool allow decode together, half-way through their
    answers; each prefill joins such a step.
    """
    sample = lengths.arriving(1.0, seed=0, num_requests=2000)
    machine = setup.machine()
    costs = machine.cost_model
    prompt, output = float(sample.prompt_tokens.mean()), float(sample.output_tokens.mean())
    context = prompt + output / 2
    fitting = machine.num_device_blocks * 16 / (context + 8)
    batch = max(1.0, min(setup.max_num_seqs, fitting / setup.pipeline_parallel_size))
    attention_s = batch * costs.decode_context_s * context
    decode_s = max(costs.floor_s, batch * costs.decode_seq_s)
    step_s = costs.base_s + decode_s + attention_s
    per_request_s = step_s / batch * output + costs.prefill_token_s * prompt
    return setup.pipeline_parallel_size / per_request_s


def sweep_points(
    lab: Lab,
    setup: Setup,
    lengths: LengthSource,
    variants: Sequence[Variant],
    *,
    num_requests: int,
    labels: Labels,
    loads: Sequence[float] = LOADS,
    cv: float = 1.0,
) -> list[Point]:
    """Return a point per variant, load and seed; `labels` tell this sweep from others."""
    peak, machine = saturation(setup, lengths), setup.machine()
    return [
        Point(
            {**labels, "variant": variant.name, "load": load, "rate": load * peak, "seed": seed},
            setup.config(variant.policy, variant.mode, **variant.changes),
            machine,
            lengths.arriving(
                load * peak, seed=seed, num_requests=lab.sized(num_requests), cv=cv,
                window=setup.config(variant.policy).max_model_len,
            ),
        )
        for variant in variants
        for load in lab.some(loads)
        for seed in lab.seeds()
    ]  # fmt: skip


def curve(
    results: Sequence[Result], labels: Labels, figure: Callable[[Result], float]
) -> dict[str, Any]:
    """Return a figure by rate, mean and standard deviation over the seeds."""
    mine = [result for result in results if result.matches(labels)]
    rates = sorted({float(result.labels["rate"]) for result in mine})
    values = [over_seeds(mine, {"rate": rate}, figure) for rate in rates]
    return {
        "rates": rates,
        "mean": [value["mean"] for value in values],
        "std": [value["std"] for value in values],
    }


def capacity_table(
    results: Sequence[Result], labels: Labels, variants: Sequence[Variant]
) -> dict[str, Any]:
    """Return curves and capacities by variant, and each capacity over that of the first."""
    table: dict[str, Any] = {}
    for variant in variants:
        mine = {**labels, "variant": variant.name}
        table[variant.name] = {
            "capacity_at_mean": capacities(results, mine, norm_mean),
            "capacity_at_p95": capacities(results, mine, norm_p95),
            "mean_s_per_token": curve(results, mine, norm_mean),
            "p95_s_per_token": curve(results, mine, norm_p95),
            "preemptions": curve(results, mine, lambda r: float(r.report["preemptions"]))["mean"],
            "recomputed_tokens": curve(
                results, mine, lambda r: float(r.report["recomputed_tokens"])
            )["mean"],
        }
    first = table[variants[0].name]
    for row in table.values():
        for which in ("capacity_at_mean", "capacity_at_p95"):
            row[f"{which}_gain"] = row[which]["mean"] / first[which]["mean"]
    return table


def draw(axes: Axes, table: Mapping[str, Any], which: str, title: str) -> None:
    """Draw latency against rate, one line per variant, with the limit."""
    for color, (name, row) in enumerate(table.items()):
        line = row[which]
        axes.errorbar(line["rates"], line["mean"], line["std"], label=name, color=f"C{color}",
                      marker=".", linewidth=1, capsize=2)  # fmt: skip
    axes.axhline(SLO_S, color="grey", linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("requests/s", fontsize=8)
    axes.set_ylabel("s/token", fontsize=8)
    axes.grid(alpha=0.3)


def settings(
    lab: Lab, setups: Mapping[str, Setup], lengths: Sequence[LengthSource],
    variants: Sequence[Variant], num_requests: int,
) -> dict[str, Any]:  # fmt: skip
    """Return what a sweep depends on, for its JSON."""
    return {
        "arrivals": "Poisson, redrawn per seed at 1/s and scaled to the rate",
        "seeds": list(lab.seeds()),
        "requests_per_point": lab.sized(num_requests),
        "limit_s_per_token": SLO_S,
        "lengths": {source.name: source.origin for source in lengths},
        "variants": {
            variant.name: {"policy": variant.policy, "mode": variant.mode, **variant.changes}
            for variant in variants
        },
        "setups": {name: setup.describe() for name, setup in setups.items()},
        "saturation_requests_per_s": {
            name: {source.name: saturation(setup, source) for source in lengths}
            for name, setup in setups.items()
        },
    }
