"""Rate sweeps: the same traffic under several policies, from light load to overload.

Rules: rates are multiples of the rate at which the machine saturates, worked out from costs and
mean lengths alone, so no grid is chosen by its outcome. Must not know: which experiment it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes

from experiments.capacity import SLO_S, capacities, norm_mean, norm_p95, over_seeds
from experiments.harness import Lab, Labels, Point, Result, Setup
from experiments.lengths import LengthSource

LOADS = (0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
DURATION_S = 120.0
"""How long requests arrive: in overload, every latency grows with it."""

NEVER_S = 1e9


@dataclass(frozen=True, slots=True)
class Variant:
    """A policy with its settings, under the name that figures have."""

    name: str
    policy: str
    mode: str = "recompute"
    changes: Mapping[str, Any] = field(default_factory=dict)


FORMS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "recompute ∞": ("recompute", {"max_recompute_share": math.inf}),
    "write-through": ("reactive", {"write_through": True}),
    "prefetch": ("proactive", {"write_through": False}),
}
"""Forms of a mode: recomputation without a budget; only one half of proactive, out or in."""


def mlfq(policy: str, mode: str, starvation_limit_s: float) -> Variant:
    """Return an MLFQ with this α; the mode may be one of FORMS."""
    limit = "∞" if starvation_limit_s == NEVER_S else f"{starvation_limit_s:g}"
    name = f"{policy.removesuffix('-mlfq')} α={limit}, {mode}"
    plain, changes = FORMS.get(mode, (mode, {}))
    return Variant(name, policy, plain, {"starvation_limit": starvation_limit_s, **changes})


FCFS = Variant("fcfs", "fcfs")
SRPT = Variant("srpt", "srpt")
PAPER = mlfq("skip-join-mlfq", "ideal", 0.3)
"""The paper's design if all its KV movement were hidden."""
RECOMPUTE = mlfq("skip-join-mlfq", "recompute", 0.3)
NEVER = mlfq("skip-join-mlfq", "recompute", NEVER_S)
FASTSERVE_POLICIES = (FCFS, PAPER, RECOMPUTE, NEVER, SRPT)
COLORS = {variant.name: f"C{index}" for index, variant in enumerate(FASTSERVE_POLICIES)}


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
    labels: Labels,
    loads: Sequence[float] = LOADS,
    duration_s: float = DURATION_S,
    num_requests: int | None = None,
    cv: float = 1.0,
) -> list[Point]:
    """Return a point per variant, load and seed; `labels` tell this sweep from others.

    Requests arrive for `duration_s`, unless there are to be `num_requests` at every rate.
    """
    peak, machine = saturation(setup, lengths), setup.machine()

    def count(load: float) -> int:
        return lab.sized(num_requests or max(1, round(load * peak * duration_s)))

    return [
        Point(
            {**labels, "variant": variant.name, "load": load, "rate": load * peak, "seed": seed},
            setup.config(variant.policy, variant.mode, **variant.changes),
            machine,
            lengths.arriving(
                load * peak, seed=seed, cv=cv,
                num_requests=count(load),
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
            "mean_jct_s": curve(results, mine, lambda r: float(r.report["jct_s"]["mean"]))["mean"],
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
    for index, (name, row) in enumerate(table.items()):
        line = row[which]
        color = COLORS.get(name, colormaps["tab20b"](2 * index))
        axes.errorbar(line["rates"], line["mean"], line["std"], label=name, color=color,
                      marker=".", linewidth=1, capsize=2)  # fmt: skip
    axes.axhline(SLO_S, color="grey", linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("requests/s", fontsize=8)
    axes.set_ylabel("s/token", fontsize=8)
    axes.grid(alpha=0.3)


def settings(
    lab: Lab, setups: Mapping[str, Setup], lengths: Sequence[LengthSource],
    variants: Sequence[Variant], num_requests: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return what a sweep depends on, for its JSON."""
    counted: str | int = f"those of {DURATION_S:g} s, all counted"
    if lab.is_quick or num_requests is not None:
        counted = lab.sized(num_requests or 2**30)
    return {
        "arrivals": "Poisson, redrawn per seed at 1/s and scaled to the rate",
        "seeds": list(lab.seeds()),
        "requests_per_point": counted,
        "limit_s_per_token": SLO_S,
        "lengths": {source.name: source.origin for source in lengths},
        "variants": {
            variant.name: {"policy": variant.policy, "mode": variant.mode}
            | {name: str(value) for name, value in variant.changes.items()}
            for variant in variants
        },
        "setups": {name: setup.describe() for name, setup in setups.items()},
        "saturation_requests_per_s": {
            name: {source.name: saturation(setup, source) for source in lengths}
            for name, setup in setups.items()
        },
    }
