"""Every trace under every policy, from half load to overload: `python -m experiments.workloads`.

Writes results/workloads.json and .png, and the tables of docs/workloads.md between its markers, so
that the document and the figures cannot disagree. Loads are shares of the saturated throughput of
FCFS, measured here on the same rows. Must not know: how a table is laid out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.harness import Lab, Point, Result, Setup
from experiments.lengths import traces_folder
from experiments.workload_tables import write_tables
from fastserve.host.provenance import ROOT, commit
from fastserve.sim.generators import jittered
from fastserve.sim.trace_file import read_trace
from fastserve.sim.workload import Workload

WINDOW = 131_072
SEQS = 16
SETUP = Setup(
    "llama-3-8b", "h100", max_num_seqs=SEQS,
    scheduler={"max_model_len": WINDOW, "max_num_batched_tokens": 2048,
               "enable_chunked_prefill": True},
)  # fmt: skip
LOADS = (0.5, 0.7, 0.9, 1.0, 1.1)
POLICIES = ("fcfs", "mlfq", "skip-join-mlfq", "srpt")
PARTS = ("policy", "mode", "alpha", "quanta")
FIGURES = ("jct_s", "slowdown", "normalized_latency_s", "max_gap_s", "ttft_s")
# First rows of each trace: enough for several turns of the batch, in seconds of computing.
ROWS = {
    "alpaca": 1000, "arxiv_summ": 500, "azure23_code": 1000, "azure23_conv": 600,
    "bwb_longdecode": 300, "cc_agent": 300, "lmsys_arena27": 600, "mix_alpaca90_bwb10": 1000,
    "mooncake_conv": 400, "mooncake_synth": 400, "sharegpt8k_multiturn": 500, "sharegpt": 600,
    "sharegpt_predlen": 600,
}  # fmt: skip
MODE_ROWS = {"mooncake_conv": 100, "mooncake_synth": 100, "cc_agent": 60}
MODE_LOAD = 0.9
AGENT_SCALE = 0.25  # of the prompts of cc_agent, of which half exceed the window
TUNED = ("mix_alpaca90_bwb10", "sharegpt", "bwb_longdecode")
TUNED_LOADS = (0.9, 1.1)
ALPHAS = (0.3, 1.0, 3.0, 10.0, 30.0, 1e9)
QUANTA = tuple((times, ratio) for ratio in (2.0, 4.0) for times in (1, 4, 16))


def load_traces(lab: Lab) -> dict[str, Workload]:
    """Read what there is of the traces; say what there is not."""
    found: dict[str, Workload] = {}
    for name, rows in ROWS.items():
        kind = "jsonl" if name.startswith(("mooncake", "cc_")) else "csv"
        file = (lab.traces or Path("no traces folder")) / f"{name}_dev.{kind}.gz"
        if not file.is_file():
            lab.console.print(f"{name}: skipped, {file} does not exist")
            continue
        found[name] = prepared(name, read_trace(file, lab.sized(rows, 60)))
    return found


def prepared(name: str, trace: Workload) -> Workload:
    """Return lengths, arrivals and clients: no prefix reuse, no sessions, no clock of 3 s."""
    plain = dataclasses.replace(trace, hash_ids=None, session_id=None, think_s=None, source=None)
    if name == "mooncake_conv":
        plain = jittered(np.random.default_rng(0), plain, 3.0)
    if name == "cc_agent":
        scaled = np.ceil(plain.prompt_tokens * AGENT_SCALE).astype(np.int64)
        plain = dataclasses.replace(plain, prompt_tokens=scaled)
    return plain.fitted(WINDOW, "drop")


def at_load(trace: Workload, load: float, capacity: float) -> Workload:
    """Return the trace at a share of capacity; the shape of its bursts stays."""
    return trace.faster(load * capacity / trace.rate)


def point(
    labels: Mapping[str, Any], trace: Workload, policy: str, mode: str = "ideal", **changes: Any
) -> Point:
    """Return one simulation on the machine of this document."""
    config = SETUP.config(policy, mode, **changes)
    return Point({**labels, "policy": policy, "mode": mode}, config, SETUP.machine(), trace)


def saturated_throughput(jct_s: Sequence[float]) -> float:
    """Return requests/s when all arrive at once: from the first full batch that ends to the last.

    Neither the batches that fill up nor the last one, which empties, count.
    """
    ends = np.sort(np.array(jct_s))
    margin = min(SEQS, len(ends) // 3)
    return float((len(ends) - 2 * margin) / (ends[-margin - 1] - ends[margin - 1]))


def capacities(lab: Lab, traces: Mapping[str, Workload]) -> dict[str, float]:
    """Return the saturated throughput of FCFS per trace."""
    points = [
        point({"trace": name}, trace.arriving(np.zeros(len(trace))), "fcfs")
        for name, trace in traces.items()
    ]
    results = lab.run("capacity", points)
    return {str(result.labels["trace"]): saturated_throughput(result.rows["jct_s"])
            for result in results}  # fmt: skip


def figures_of(result: Result) -> dict[str, Any]:
    """Return what the tables show of one simulation."""
    report = result.report
    counts = ("preemptions", "recomputed_tokens", "peak_live_requests", "makespan_s")
    return {name: report[name] for name in (*FIGURES, *counts)} | {"steps": report["steps"]}


def all_points(
    lab: Lab, traces: Mapping[str, Workload], capacity: Mapping[str, float]
) -> list[Point]:
    """Return the grid: policies by load, KV modes at one load, α and quanta."""
    points = []
    for name, trace in traces.items():
        for load in LOADS:
            timed = at_load(trace, load, capacity[name])
            points += [point({"part": "policy", "trace": name, "load": load}, timed, policy)
                       for policy in POLICIES]  # fmt: skip
        few = at_load(trace.first(MODE_ROWS.get(name, len(trace))), MODE_LOAD, capacity[name])
        points += [point({"part": "mode", "trace": name, "load": MODE_LOAD}, few, policy, mode)
                   for policy in POLICIES for mode in ("ideal", "recompute")]  # fmt: skip
    quantum_s = SETUP.machine().cost_model.min_iteration_s
    for name in (name for name in TUNED if name in traces):
        for load in TUNED_LOADS:
            timed = at_load(traces[name], load, capacity[name])
            for alpha in lab.some(ALPHAS):
                labels = {"part": "alpha", "trace": name, "load": load, "alpha": alpha}
                points += [point(labels, timed, policy, starvation_limit=alpha)
                           for policy in ("mlfq", "skip-join-mlfq")]  # fmt: skip
            for (times, ratio), alpha in ((q, a) for q in lab.some(QUANTA) for a in (0.3, 1e9)):
                labels = {"part": "quanta", "trace": name, "load": load, "alpha": alpha,
                          "times": times, "ratio": ratio}  # fmt: skip
                points.append(
                    point(
                        labels,
                        timed,
                        "skip-join-mlfq",
                        starvation_limit=alpha,
                        mlfq_quantum=times * quantum_s,
                        mlfq_quantum_ratio=ratio,
                    )
                )
    return points


def draw(entries: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    """Draw mean JCT over that of FCFS against load, a panel per trace."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    panels = figure.subplots(3, 5, sharex=True).ravel()
    for axes, name in zip(panels, names, strict=False):
        mine = {(entry["load"], entry["policy"]): entry["jct_s"]["mean"] for entry in entries
                if entry["part"] == "policy" and entry["trace"] == name}  # fmt: skip
        for policy in POLICIES:
            ratios = [mine[load, policy] / mine[load, "fcfs"] for load in LOADS]
            axes.plot(LOADS, ratios, marker=".", label=policy)
        axes.set_title(name, fontsize=9)
    panels[0].legend(fontsize=8)
    for axes in panels[len(names) :]:
        axes.axis("off")
    figure.supxlabel("load, share of FCFS's saturated throughput")
    figure.supylabel("mean JCT over that of FCFS")
    return figure


def kept_entries(file: Path, part: str | None) -> list[dict[str, Any]]:
    """Return the figures of the other parts, where only one is measured anew."""
    if part is None:
        return []
    entries = json.loads(file.read_text(encoding="utf-8"))["figures"]["entries"]
    return [entry for entry in entries if entry["part"] != part]


def run(lab: Lab, document: Path, part: str | None = None) -> None:
    """Measure, save and write the tables."""
    kept = kept_entries(lab.output / "workloads.json", part)
    traces = load_traces(lab)
    if not traces:
        return
    capacity = capacities(lab, traces)
    points = [point for point in all_points(lab, traces, capacity)
              if part in (None, point.labels["part"])]  # fmt: skip
    results = lab.run("workloads", points)
    now = commit()
    entries = [{**result.labels, "commit": now, **figures_of(result)} for result in results]
    entries += kept
    figures = {
        "traces": {name: describe(trace, capacity[name]) for name, trace in traces.items()},
        "entries": entries,
    }
    settings = {
        "machine": SETUP.describe(),
        "loads": LOADS,
        "policies": POLICIES,
        "mode_load": MODE_LOAD,
        "arrivals": "of the trace, divided by one factor; mooncake_conv jittered by 0..3 s",
        "agent_prompts_times": AGENT_SCALE,
    }
    lab.save("workloads", settings=settings, figures=figures, picture=draw(entries, list(traces)))
    if not lab.is_quick:
        write_tables(lab.output / "workloads.json", document)


def describe(trace: Workload, capacity: float) -> dict[str, float]:
    """Return what a reader must know of the rows used."""
    return {
        "rows": len(trace),
        "dropped": trace.num_dropped,
        "prompt_mean": float(trace.prompt_tokens.mean()),
        "output_mean": float(trace.output_tokens.mean()),
        "output_cv2": float(trace.output_tokens.var() / trace.output_tokens.mean() ** 2),
        "gap_cv": float(np.diff(trace.arrived_at).std() / np.diff(trace.arrived_at).mean()),
        "capacity": capacity,
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows: does it work?")
    parser.add_argument("--traces", help="folder of the traces")
    parser.add_argument("--output", type=Path, default=ROOT / "results")
    parser.add_argument("--part", choices=PARTS, help="measure this one, keep the others")
    arguments = parser.parse_args()
    command = ["python", "-m", "experiments.workloads"]
    command += [f"--part={arguments.part}"] if arguments.part else []
    lab = Lab(is_quick=arguments.quick, traces=traces_folder(arguments.traces),
              output=arguments.output, command=command)  # fmt: skip
    run(lab, ROOT / "docs" / "workloads.md", arguments.part)


if __name__ == "__main__":
    main()
