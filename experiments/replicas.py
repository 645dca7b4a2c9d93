"""Replicas behind the router against one queue that sees all: `python -m experiments.replicas`.

One queue that sees all is one scheduler over all machines: N slots of as many seats as a machine
has, whole steps on each, the KV of all as one pool. Whenever a machine is free it takes the best of
all requests there are, whoever ran them before, and KV moves for nothing. No router can do better
than that but by chance, for a request stays where it was placed: the ratio is what placing costs.
Chance is large on few machines: where arrivals were made up, they are drawn DRAWS times.
Writes results/replicas.json and the table of docs/replicas.md between its markers. Loads are shares
of the saturated throughput of FCFS on one machine, times the machines.
Must not know: how a request is placed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.harness import Lab, Point, Result
from experiments.lengths import traces_folder
from experiments.markdown import fill, markdown
from experiments.workload_traces import SYNTHETIC, at_load, load_traces, redrawn
from experiments.workloads import SETUP, capacities
from fastserve.host.provenance import ROOT
from fastserve.sim.workload import Workload

TRACES = ("mix_alpaca90_bwb10", "azure23_code", "azure23_conv")
SIZES = (2, 4, 8, 64)
POLICIES = ("fcfs", "learned")
LOAD = 0.9
ROWS_PER_REPLICA = 75  # nearly five turns of a batch of 16
MIN_ROWS = 600
CAPACITY_ROWS = 1000
DRAWS = {2: 9, 4: 5, 8: 5, 64: 1}  # of arrivals, by machines; the first is the trace's own
QUEUES = ("router", "one queue")
CASE = ("trace", "replicas")


def rows_of(size: int) -> int:
    """Return how many rows so many replicas are given; shorter traces give all they have."""
    return max(ROWS_PER_REPLICA * size, MIN_ROWS)


def traces_of(lab: Lab, num_rows: int) -> dict[str, Workload]:
    """Return the first rows of each trace."""
    return load_traces(lab, dict.fromkeys(TRACES, num_rows))


def points(lab: Lab, capacity: Mapping[str, float]) -> Iterator[Point]:
    """Yield each trace, number of machines and policy, behind the router and as one queue."""
    machine = SETUP.machine()
    for size in lab.some(SIZES):
        pooled = dataclasses.replace(machine, num_device_blocks=size * machine.num_device_blocks)
        for name, trace in traces_of(lab, rows_of(size)).items():
            draws = range(DRAWS[size] if name in SYNTHETIC else 1)
            for draw, policy in itertools.product(lab.some(draws), POLICIES):
                timed = at_load(redrawn(trace, draw), LOAD, size * capacity[name])
                labels = {"trace": name, "replicas": size, "draw": draw, "policy": policy,
                          "rows": len(timed)}  # fmt: skip
                config = SETUP.config(policy)
                tokens = config.max_num_batched_tokens
                yield Point({**labels, "queue": QUEUES[0]}, config, machine, timed,
                            num_replicas=size)  # fmt: skip
                one = SETUP.config(policy, num_slots=size, max_num_batched_tokens=size * tokens)
                yield Point({**labels, "queue": QUEUES[1]}, one, pooled, timed, is_parallel=True)


def figures_of(result: Result) -> dict[str, Any]:
    """Return what is kept of one simulation."""
    names = ("jct_s", "ttft_s", "max_gap_s", "busy_s", "makespan_s", "preemptions")
    return {**result.labels, **{name: result.report[name] for name in names}}


def as_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return mean and P99 JCT behind the router over those of one queue, by policy.

    Of several draws that is the mean of their ratios, and in brackets the least and the largest.
    """
    found = {tuple(entry[name] for name in (*CASE, "draw", "policy", "queue")): entry
             for entry in entries}  # fmt: skip
    header = ["trace", "replicas", "rows", "draws"]
    header += [f"`{policy}`, {part}" for policy in POLICIES for part in ("mean", "P99")]
    rows = []
    for case in dict.fromkeys(tuple(entry[name] for name in CASE) for entry in entries):
        draws = [draw for *of, draw, policy, queue in found
                 if tuple(of) == case and (policy, queue) == (POLICIES[0], QUEUES[0])]  # fmt: skip
        cells = []
        for policy, part in itertools.product(POLICIES, ("mean", "p99")):
            ratios = []
            for draw in draws:
                routed, one = (found[*case, draw, policy, queue]["jct_s"] for queue in QUEUES)
                ratios.append(routed[part] / one[part])
            cells.append(spread(ratios))
        trace, size = case
        num_rows = found[*case, draws[0], POLICIES[0], QUEUES[0]]["rows"]
        rows.append([trace, str(size), f"{num_rows:,}", str(len(draws)), *cells])
    return markdown(header, rows)


def spread(values: Sequence[float]) -> str:
    """Return a mean, and the least and the largest of several."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def run(lab: Lab, document: Path) -> None:
    """Measure, save and write the table."""
    traces = traces_of(lab, CAPACITY_ROWS)
    if len(traces) < len(TRACES):
        return
    capacity = capacities(lab, traces)
    results = lab.run("replicas", list(points(lab, capacity)))
    entries = [figures_of(result) for result in results]
    settings = {
        "machine": SETUP.describe(),
        "load": LOAD, "sizes": SIZES, "policies": POLICIES,
        "arrivals": "of the trace, divided by one factor; of a made-up one drawn anew",
        "draws": DRAWS,
        "rows": f"{ROWS_PER_REPLICA} a replica, {MIN_ROWS} at least, or all there are",
    }  # fmt: skip
    lab.save("replicas", settings=settings, figures={"capacity": capacity, "entries": entries})
    if not lab.is_quick:
        fill(document, {"replicas": as_table(entries)})


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows: does it work?")
    parser.add_argument("--traces", help="folder of the traces")
    parser.add_argument("--output", type=Path, default=ROOT / "results")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "replicas.md")
    arguments = parser.parse_args()
    lab = Lab(is_quick=arguments.quick, traces=traces_folder(arguments.traces),
              output=arguments.output,
              command=["python", "-m", "experiments.replicas"])  # fmt: skip
    run(lab, arguments.document)


if __name__ == "__main__":
    main()
