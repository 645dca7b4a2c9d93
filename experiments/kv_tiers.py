"""Short KV under every mode of preemption: `python -m experiments.kv_tiers`.

Machines whose KV pool is smaller than their batch, and two on which it is not. Writes
results/kv_tiers.json and .png, and the tables of docs/kv-memory.md between its markers. Loads are
shares of the saturated throughput of FCFS that recomputes, on the same rows. Must not know: how a
table is laid out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.harness import Lab, Point, Result, Setup
from experiments.kv_tier_tables import select, write_tables
from experiments.lengths import traces_folder
from experiments.workload_traces import at_load, at_once, load_traces, saturated_throughput
from fastserve.host.provenance import ROOT
from fastserve.sim.workload import Workload

SCHEDULER = {"max_num_batched_tokens": 2048, "enable_chunked_prefill": True}
SETUPS = {
    "OPT-13B, A100-40G": Setup("opt-13b", "a100-40g", max_num_seqs=256, scheduler=SCHEDULER),
    "Llama-2-13B, A100-40G": Setup(
        "llama-2-13b", "a100-40g", max_num_seqs=256, scheduler=SCHEDULER
    ),
    "OPT-66B, 4 × A100-40G": Setup(
        "opt-66b", "a100-40g", tensor_parallel_size=4, max_num_seqs=256, scheduler=SCHEDULER
    ),
    "Llama-2-13B, A100-80G": Setup(
        "llama-2-13b", "a100-80g", max_num_seqs=256, scheduler=SCHEDULER
    ),
    "Llama-3-8B, H100": Setup("llama-3-8b", "h100", max_num_seqs=256, scheduler=SCHEDULER),
}
AMPLE = ("Llama-2-13B, A100-80G", "Llama-3-8B, H100")
"""Those that hold what their batch needs: more memory, or a quarter of the KV and PCIe 5.

They run at one load, and without the mixture: 500 rows, 50 of them long, do not fill their batch.
"""

ROWS = {"mix_alpaca90_bwb10": 500, "sharegpt": 500}
POLICIES = ("fcfs", "skip-join-mlfq", "learned")
MODES = ("recompute", "defer", "reactive", "proactive", "ideal")
LOADS = (0.7, 0.9, 1.0)
FIGURES = ("jct_s", "normalized_latency_s", "ttft_s", "max_gap_s", "breakdown_s")
COUNTS = (
    "preemptions", "recomputed_tokens", "swap_in_bytes", "swap_out_bytes", "fetched_bytes",
    "saved_bytes", "clean_bytes", "wasted_bytes", "copy_wait_s", "peak_host_blocks",
    "peak_live_requests", "busy_s", "makespan_s", "steps",
)  # fmt: skip


def traces_of(lab: Lab, setup_name: str) -> dict[str, Workload]:
    """Return the traces of a machine, cut where the window of the model ends."""
    window = SETUPS[setup_name].config("fcfs").max_model_len
    rows = {"sharegpt": ROWS["sharegpt"]} if setup_name in AMPLE else ROWS
    return {name: trace.fitted(window, "clip") for name, trace in load_traces(lab, rows).items()}


def capacities(lab: Lab, setup_name: str) -> dict[str, float]:
    """Return the saturated throughput of FCFS that recomputes, by trace."""
    setup = SETUPS[setup_name]
    points = [
        Point({"trace": name}, setup.config("fcfs"), setup.machine(), at_once(trace))
        for name, trace in traces_of(lab, setup_name).items()
    ]
    results = lab.run(f"capacity, {setup.model} on {setup.hardware}", points)
    return {
        str(result.labels["trace"]): saturated_throughput(result.rows["jct_s"], setup.max_num_seqs)
        for result in results
    }


def points(lab: Lab, capacity: Mapping[str, Mapping[str, float]]) -> Iterator[Point]:
    """Yield every machine, trace, load, policy and mode."""
    for setup_name, setup in SETUPS.items():
        machine = setup.machine()
        for name, trace in traces_of(lab, setup_name).items():
            for load in LOADS[-1:] if setup_name in AMPLE else lab.some(LOADS):
                timed = at_load(trace, load, capacity[setup_name][name])
                for policy in POLICIES:
                    for mode in MODES:
                        labels = {"setup": setup_name, "trace": name, "load": load,
                                  "policy": policy, "mode": mode}  # fmt: skip
                        yield Point(labels, setup.config(policy, mode), machine, timed)


def figures_of(result: Result) -> dict[str, Any]:
    """Return what is kept of one simulation, with the share of the time that the link was busy."""
    report, setup = result.report, SETUPS[str(result.labels["setup"])]
    machine = setup.machine()
    block_s = machine.cost_model.copy_block_s / machine.block_bytes
    busy = {f"link_{way}_share": report[f"swap_{way}_bytes"] * block_s / report["makespan_s"]
            for way in ("in", "out")}  # fmt: skip
    return {name: report[name] for name in (*FIGURES, *COUNTS)} | busy


def draw(entries: Sequence[Mapping[str, Any]], setups: Sequence[str]) -> Figure:
    """Draw mean JCT over that of FCFS that recomputes, a panel per machine and trace."""
    figure = Figure(figsize=(3.2 * len(setups), 6.5), layout="constrained")
    panels = figure.subplots(len(ROWS), len(setups), squeeze=False)
    for row, trace in enumerate(ROWS):
        for column, setup in enumerate(setups):
            axes, mine = panels[row][column], select(entries, setup=setup, trace=trace)
            if not mine:
                axes.axis("off")
                continue
            base = {entry["load"]: entry["jct_s"]["mean"]
                    for entry in select(mine, policy="fcfs", mode="recompute")}  # fmt: skip
            for color, policy in enumerate(POLICIES):
                for mode, style in zip(MODES, (":", "-.", "--", "-", ""), strict=True):
                    found = select(mine, policy=policy, mode=mode)
                    axes.plot(
                        [entry["load"] for entry in found],
                        [entry["jct_s"]["mean"] / base[entry["load"]] for entry in found],
                        color=f"C{color}", linestyle=style, marker="" if style else "o",
                        label=f"{policy}, {mode}" if not row and not column else None,
                    )  # fmt: skip
            axes.set_title(f"{setup}\n{trace}", fontsize=8)
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, fontsize=7)
    figure.supxlabel("load, share of FCFS's saturated throughput", fontsize=9)
    figure.supylabel("mean JCT over that of fcfs, recompute", fontsize=9)
    return figure


def run(lab: Lab, document: Path) -> None:
    """Measure, save and write the tables."""
    if not load_traces(lab, ROWS):
        return
    capacity = {name: capacities(lab, name) for name in SETUPS}
    results = lab.run("kv_tiers", list(points(lab, capacity)))
    entries = [{**result.labels, **figures_of(result)} for result in results]
    settings = {
        "setups": {name: setup.describe() for name, setup in SETUPS.items()},
        "arrivals": "of the trace, divided by one factor",
        "loads": LOADS, "policies": POLICIES, "modes": MODES, "rows": ROWS,
    }  # fmt: skip
    figures = {"capacity": capacity, "entries": entries}
    lab.save("kv_tiers", settings=settings, figures=figures, picture=draw(entries, list(SETUPS)))
    if not lab.is_quick:
        write_tables(lab.output / "kv_tiers.json", document)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows: does it work?")
    parser.add_argument("--traces", help="folder of the traces")
    parser.add_argument("--output", type=Path, default=ROOT / "results")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "kv-memory.md")
    arguments = parser.parse_args()
    lab = Lab(is_quick=arguments.quick, traces=traces_folder(arguments.traces),
              output=arguments.output,
              command=["python", "-m", "experiments.kv_tiers"])  # fmt: skip
    run(lab, arguments.document)


if __name__ == "__main__":
    main()
