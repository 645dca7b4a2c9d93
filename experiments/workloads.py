"""Every trace under every policy, from half load to overload: `python -m experiments.workloads`.

Writes results/workloads.json and .png, and the tables of docs/workloads.md between its markers, so
that the document and the figures cannot disagree. Its parts can be measured one by one. Must not
know: how a table is laid out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.harness import Lab, Labels, Point, Result, Setup
from experiments.lengths import traces_folder
from experiments.workload_tables import write_tables
from experiments.workload_traces import (
    AGENT_SCALE,
    SYNTHETIC,
    WINDOW,
    at_load,
    at_once,
    describe,
    load_traces,
    redrawn,
    saturated_throughput,
)
from fastserve.host.provenance import ROOT, commit
from fastserve.sim.workload import Workload

SETUP = Setup(
    "llama-3-8b", "h100", max_num_seqs=16,
    scheduler={"max_model_len": WINDOW, "max_num_batched_tokens": 2048,
               "enable_chunked_prefill": True},
)  # fmt: skip
POLICIES = ("fcfs", "mlfq", "skip-join-mlfq", "hrrn", "sjf", "learned", "srpt")
LOADS = (0.5, 0.7, 0.9, 1.0, 1.1)
PARTS = ("policy", "seeds", "mode", "kv", "kv-seeds", "alpha", "quanta")
LABELS = ("part", "setup", "trace", "load", "seed", "policy", "mode", "alpha", "times", "ratio")
FIGURES = ("jct_s", "slowdown", "normalized_latency_s", "max_gap_s", "ttft_s")

COMPARED = ("fcfs", "skip-join-mlfq", "learned")
SEEDS = (1, 2)  # beside 0, the arrivals of the trace
SEED_LOADS = (0.7, 0.9, 1.0, 1.1)
MODE_LOADS = (0.9, 1.0, 1.1)

KV_SCHEDULER = {"max_num_batched_tokens": 2048, "enable_chunked_prefill": True}
KV_SETUPS = {
    f"{model} on {hardware}": Setup(model, hardware, max_num_seqs=256, scheduler=KV_SCHEDULER)
    for model, hardware in (("opt-13b", "a100-40g"), ("llama-2-13b", "a100-80g"))
}
KV_ROWS = {"sharegpt": 1000, "alpaca": 1500, "mix_alpaca90_bwb10": 1000, "lmsys_arena27": 1000}
KV_LOADS = (0.7, 0.9, 1.0, 1.1)
KV_SEEDS = (0, 1, 2, 3, 4)
KV_SEEDS_SETUP, KV_SEEDS_LOAD = "opt-13b on a100-40g", 1.0

TUNED = ("mix_alpaca90_bwb10", "sharegpt", "bwb_longdecode")
TUNED_LOADS = (0.9, 1.1)
ALPHAS = (0.3, 1.0, 3.0, 10.0, 30.0, 1e9)
QUANTA = tuple((times, ratio) for ratio in (2.0, 4.0) for times in (1, 4, 16))

Traces = Mapping[str, Workload]
Capacities = Mapping[str, float]


def point(
    labels: Labels,
    trace: Workload,
    policy: str,
    mode: str = "ideal",
    setup: Setup = SETUP,
    **changes: Any,
) -> Point:
    """Return one simulation; without a set-up on the machine of the document."""
    config = setup.config(policy, mode, **changes)
    return Point({**labels, "policy": policy, "mode": mode}, config, setup.machine(), trace)


def capacities(
    lab: Lab, traces: Traces, mode: str = "ideal", setup: Setup = SETUP
) -> dict[str, float]:
    """Return the saturated throughput of FCFS per trace."""
    points = [point({"trace": name}, at_once(trace), "fcfs", mode, setup)
              for name, trace in traces.items()]  # fmt: skip
    results = lab.run(f"capacity, {setup.model}", points)
    return {str(result.labels["trace"]): saturated_throughput(result.rows["jct_s"],
                                                              setup.max_num_seqs)
            for result in results}  # fmt: skip


def figures_of(result: Result) -> dict[str, Any]:
    """Return what the tables show of one simulation."""
    report = result.report
    counts = ("preemptions", "recomputed_tokens", "peak_live_requests", "makespan_s")
    return {name: report[name] for name in (*FIGURES, *counts)} | {"steps": report["steps"]}


def policy_points(traces: Traces, capacity: Capacities) -> Iterator[Point]:
    """Yield every policy at every load."""
    for name, trace in traces.items():
        for load in LOADS:
            timed = at_load(trace, load, capacity[name])
            for policy in POLICIES:
                yield point({"part": "policy", "trace": name, "load": load}, timed, policy)


def seed_points(traces: Traces, capacity: Capacities) -> Iterator[Point]:
    """Yield the arrivals that were drawn, drawn again."""
    for name in (name for name in SYNTHETIC if name in traces):
        for load in SEED_LOADS:
            for seed in SEEDS:
                timed = at_load(redrawn(traces[name], seed), load, capacity[name])
                labels = {"part": "seeds", "trace": name, "load": load, "seed": seed}
                for policy in COMPARED:
                    yield point(labels, timed, policy)


def mode_points(traces: Traces, capacity: Capacities) -> Iterator[Point]:
    """Yield KV that moves for nothing beside KV that is computed again."""
    for name, trace in traces.items():
        for load in MODE_LOADS:
            timed = at_load(trace, load, capacity[name])
            labels = {"part": "mode", "trace": name, "load": load}
            for policy in COMPARED:
                for mode in ("ideal", "recompute"):
                    yield point(labels, timed, policy, mode)


def kv_points(lab: Lab, capacity: Mapping[str, Capacities]) -> Iterator[Point]:
    """Yield machines whose KV pool holds fewer requests than the batch might."""
    for setup_name, setup in KV_SETUPS.items():
        for name, trace in kv_traces(lab, setup).items():
            for load in KV_LOADS:
                timed = at_load(trace, load, capacity[setup_name][name])
                labels = {"part": "kv", "setup": setup_name, "trace": name, "load": load}
                for policy in COMPARED:
                    yield point(labels, timed, policy, "recompute", setup)


def kv_seed_points(lab: Lab, capacity: Mapping[str, Capacities]) -> Iterator[Point]:
    """Yield the machine that is shortest of KV at load 1, arrivals drawn again."""
    setup = KV_SETUPS[KV_SEEDS_SETUP]
    for name, trace in kv_traces(lab, setup).items():
        for seed in KV_SEEDS if name in SYNTHETIC else ():
            rate = capacity[KV_SEEDS_SETUP][name]
            timed = at_load(redrawn(trace, seed), KV_SEEDS_LOAD, rate)
            labels = {"part": "kv-seeds", "trace": name, "load": KV_SEEDS_LOAD, "seed": seed}
            for policy in COMPARED:
                yield point(labels, timed, policy, "recompute", setup)


def kv_traces(lab: Lab, setup: Setup) -> dict[str, Workload]:
    """Return the traces, cut where the window of the model ends."""
    window = setup.config("fcfs").max_model_len
    return {name: trace.fitted(window, "clip")
            for name, trace in load_traces(lab, KV_ROWS).items()}  # fmt: skip


def alpha_points(lab: Lab, traces: Traces, capacity: Capacities) -> Iterator[Point]:
    """Yield the MLFQs by their limit of starvation."""
    for name in (name for name in TUNED if name in traces):
        for load in TUNED_LOADS:
            timed = at_load(traces[name], load, capacity[name])
            for alpha in lab.some(ALPHAS):
                labels = {"part": "alpha", "trace": name, "load": load, "alpha": alpha}
                for policy in ("mlfq", "skip-join-mlfq"):
                    yield point(labels, timed, policy, starvation_limit=alpha)


def quanta_points(lab: Lab, traces: Traces, capacity: Capacities) -> Iterator[Point]:
    """Yield skip-join by its first quantum and their ratio."""
    quantum_s = SETUP.machine().cost_model.min_iteration_s
    for name in (name for name in TUNED if name in traces):
        for load in TUNED_LOADS:
            timed = at_load(traces[name], load, capacity[name])
            for (times, ratio), alpha in ((q, a) for q in lab.some(QUANTA) for a in (0.3, 1e9)):
                labels = {"part": "quanta", "trace": name, "load": load, "alpha": alpha,
                          "times": times, "ratio": ratio}  # fmt: skip
                yield point(labels, timed, "skip-join-mlfq", starvation_limit=alpha,
                            mlfq_quantum=times * quantum_s, mlfq_quantum_ratio=ratio)  # fmt: skip


def draw(entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    """Draw mean JCT over that of FCFS against load, a panel per trace."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    panels = figure.subplots(3, 5, sharex=True).ravel()
    for axes, name in zip(panels, names, strict=False):
        mine = {(entry["load"], entry["policy"]): entry["jct_s"]["mean"] for entry in entries
                if entry["part"] == "policy" and entry["trace"] == name}  # fmt: skip
        for policy in POLICIES:
            loads = [load for load in LOADS if (load, policy) in mine]
            ratios = [mine[load, policy] / mine[load, "fcfs"] for load in loads]
            axes.plot(loads, ratios, marker=".", label=policy)
        axes.set_title(name, fontsize=9)
    panels[0].legend(fontsize=8)
    for axes in panels[len(names) :]:
        axes.axis("off")
    figure.supxlabel("load, share of FCFS's saturated throughput")
    figure.supylabel("mean JCT over that of FCFS")
    return figure


def kept_figures(file: Path, parts: Sequence[str], policies: Sequence[str]) -> dict[str, Any]:
    """Return the figures that are there, or none where all are measured anew."""
    if set(parts) == set(PARTS) and set(policies) == set(POLICIES):
        return {"entries": []}
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["figures"]
    return figures


def merged(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return all entries: of two with the same labels the new one, in the place of the old."""
    by_labels = {tuple(entry.get(label) for label in LABELS): entry for entry in (*old, *new)}
    return list(by_labels.values())


def run(
    lab: Lab, document: Path, parts: Sequence[str] = PARTS, policies: Sequence[str] = POLICIES
) -> None:
    """Measure, save and write the tables."""
    figures = kept_figures(lab.output / "workloads.json", parts, policies)
    traces = load_traces(lab)
    if not traces:
        return
    capacity = capacities(lab, traces)
    by_part: dict[str, Iterator[Point]] = {
        "policy": policy_points(traces, capacity),
        "seeds": seed_points(traces, capacity),
        "mode": mode_points(traces, capacity),
        "alpha": alpha_points(lab, traces, capacity),
        "quanta": quanta_points(lab, traces, capacity),
    }
    if not {"kv", "kv-seeds"}.isdisjoint(parts):
        figures["kv"] = {name: capacities(lab, kv_traces(lab, setup), "recompute", setup)
                         for name, setup in KV_SETUPS.items()}  # fmt: skip
        by_part["kv"] = kv_points(lab, figures["kv"])
        by_part["kv-seeds"] = kv_seed_points(lab, figures["kv"])
    points = [point for part in parts for point in by_part[part]
              if point.labels["policy"] in policies]  # fmt: skip
    results = lab.run("workloads", points)
    now = commit()
    measured = [{**result.labels, "commit": now, **figures_of(result)} for result in results]
    figures["entries"] = merged(figures["entries"], measured)
    figures["traces"] = {name: describe(trace, capacity[name]) for name, trace in traces.items()}
    settings = {
        "machine": SETUP.describe(),
        "kv_machines": {name: setup.describe() for name, setup in KV_SETUPS.items()},
        "loads": LOADS,
        "policies": POLICIES,
        "arrivals": "of the trace, divided by one factor; mooncake_conv jittered by 0..3 s",
        "seeds": f"0 is the trace's own arrivals; {SEEDS} are exponential gaps drawn anew",
        "agent_prompts_times": AGENT_SCALE,
    }
    picture = draw(figures["entries"], list(traces))
    lab.save("workloads", settings=settings, figures=figures, picture=picture)
    if not lab.is_quick:
        write_tables(lab.output / "workloads.json", document)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows: does it work?")
    parser.add_argument("--traces", help="folder of the traces")
    parser.add_argument("--output", type=Path, default=ROOT / "results")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "workloads.md")
    parser.add_argument("--part", choices=PARTS, action="append",
                        help="measure this one, keep the others; repeatable")  # fmt: skip
    parser.add_argument("--policy", choices=POLICIES, action="append",
                        help="the same of policies")  # fmt: skip
    arguments = parser.parse_args()
    parts, policies = arguments.part or PARTS, arguments.policy or POLICIES
    command = ["python", "-m", "experiments.workloads"]
    command += [f"--part={part}" for part in arguments.part or ()]
    command += [f"--policy={policy}" for policy in arguments.policy or ()]
    lab = Lab(is_quick=arguments.quick, traces=traces_folder(arguments.traces),
              output=arguments.output, command=command)  # fmt: skip
    run(lab, arguments.document, parts, policies)


if __name__ == "__main__":
    main()
