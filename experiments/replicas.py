"""Replicas behind the router against one queue that sees all: `python -m experiments.replicas`.

One queue that sees all is one scheduler over all machines: N slots of as many seats as a machine
has, whole steps on each, the KV of all as one pool. Whenever a machine is free it takes the best of
all requests there are, whoever ran them before, and KV moves for nothing. No router can do better
than that but by chance, for a request stays where it was placed: the ratio is what placing costs.
Writes results/replicas.json and the table of docs/replicas.md between its markers. Loads are shares
of the saturated throughput of FCFS on one machine, times the machines.
`--draws N` measures something else: how much of a ratio is chance. On two machines, the mixture's
arrivals are drawn N times (results/replica_draws.json, another table of the document).
Must not know: how a request is placed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.harness import Lab, Point, Result
from experiments.lengths import traces_folder
from experiments.markdown import fill, markdown
from experiments.workload_traces import at_load, load_traces, redrawn
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
QUEUES = ("router", "one queue")
DRAWN_TRACE, DRAWN_SIZE = TRACES[0], SIZES[0]


def rows_of(size: int) -> int:
    """Return how many rows so many replicas are given; shorter traces give all they have."""
    return max(ROWS_PER_REPLICA * size, MIN_ROWS)


def traces_of(lab: Lab, num_rows: int) -> dict[str, Workload]:
    """Return the first rows of each trace."""
    return load_traces(lab, dict.fromkeys(TRACES, num_rows))


def points(lab: Lab, capacity: Mapping[str, float]) -> Iterator[Point]:
    """Yield each trace, number of machines and policy, behind the router and as one queue."""
    for size in lab.some(SIZES):
        for name, trace in traces_of(lab, rows_of(size)).items():
            timed = at_load(trace, LOAD, size * capacity[name])
            yield from compared({"trace": name}, size, timed)


def drawn_points(lab: Lab, capacity: Mapping[str, float], num_draws: int) -> Iterator[Point]:
    """Yield the mixture on two machines, its arrivals drawn anew each time."""
    trace = traces_of(lab, rows_of(DRAWN_SIZE))[DRAWN_TRACE]
    for draw in range(num_draws):
        timed = at_load(redrawn(trace, draw), LOAD, DRAWN_SIZE * capacity[DRAWN_TRACE])
        yield from compared({"trace": DRAWN_TRACE, "draw": draw}, DRAWN_SIZE, timed)


def compared(labels: Mapping[str, Any], size: int, timed: Workload) -> Iterator[Point]:
    """Yield a workload under each policy, behind the router and as one queue."""
    machine = SETUP.machine()
    pooled = dataclasses.replace(machine, num_device_blocks=size * machine.num_device_blocks)
    for policy in POLICIES:
        told = {**labels, "replicas": size, "policy": policy, "rows": len(timed)}
        config = SETUP.config(policy)
        tokens = config.max_num_batched_tokens
        yield Point({**told, "queue": QUEUES[0]}, config, machine, timed, num_replicas=size)
        one = SETUP.config(policy, num_slots=size, max_num_batched_tokens=size * tokens)
        yield Point({**told, "queue": QUEUES[1]}, one, pooled, timed, is_parallel=True)


def figures_of(result: Result) -> dict[str, Any]:
    """Return what is kept of one simulation."""
    names = ("jct_s", "ttft_s", "max_gap_s", "busy_s", "makespan_s", "preemptions")
    return {**result.labels, **{name: result.report[name] for name in names}}


def as_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return mean and P99 JCT behind the router over those of one queue, by policy."""
    found = {tuple(entry[name] for name in ("trace", "replicas", "policy", "queue")): entry
             for entry in entries}  # fmt: skip
    header = ["trace", "replicas", "rows"]
    header += [f"`{policy}`, {part}" for policy in POLICIES for part in ("mean", "P99")]
    rows = []
    for trace, size in dict.fromkeys((entry["trace"], entry["replicas"]) for entry in entries):
        cells = []
        for policy in POLICIES:
            routed, one = (found[trace, size, policy, queue]["jct_s"] for queue in QUEUES)
            cells += [f"{routed[part] / one[part]:.2f}" for part in ("mean", "p99")]
        num_rows = found[trace, size, POLICIES[0], QUEUES[0]]["rows"]
        rows.append([trace, str(size), f"{num_rows:,}", *cells])
    return markdown(header, rows)


def draws_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return, by policy, the ratio of means of each draw, and the mean of these."""
    means = {tuple(entry[name] for name in ("draw", "policy", "queue")): entry["jct_s"]["mean"]
             for entry in entries}  # fmt: skip
    draws = list(dict.fromkeys(entry["draw"] for entry in entries))
    rows = []
    for policy in POLICIES:
        ratios = [means[draw, policy, QUEUES[0]] / means[draw, policy, QUEUES[1]] for draw in draws]
        cells = [f"{value:.2f}" for value in (*ratios, fmean(ratios))]
        rows.append([f"`{policy}`", *cells])
    return markdown(["policy", *(f"draw {draw}" for draw in draws), "mean"], rows)


def run_draws(lab: Lab, document: Path, num_draws: int) -> None:
    """Measure, save and write the table of draws."""
    traces = traces_of(lab, CAPACITY_ROWS)
    if DRAWN_TRACE not in traces:
        return
    capacity = capacities(lab, {DRAWN_TRACE: traces[DRAWN_TRACE]})
    results = lab.run("replica_draws", list(drawn_points(lab, capacity, num_draws)))
    entries = [figures_of(result) for result in results]
    settings = {"machine": SETUP.describe(), "load": LOAD, "policies": POLICIES}
    lab.save("replica_draws", settings=settings,
             figures={"capacity": capacity, "entries": entries})  # fmt: skip
    if not lab.is_quick:
        fill(document, {"replica-draws": draws_table(entries)})


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
        "arrivals": "of the trace, divided by one factor",
        "rows": f"{ROWS_PER_REPLICA} a replica, {MIN_ROWS} at least, or all there are",
    }  # fmt: skip
    lab.save("replicas", settings=settings, figures={"capacity": capacity, "entries": entries})
    if not lab.is_quick:
        fill(document, {"replicas": as_table(entries)})


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows: does it work?")
    parser.add_argument("--draws", type=int, help="draw the mixture's arrivals so often instead")
    parser.add_argument("--traces", help="folder of the traces")
    parser.add_argument("--output", type=Path, default=ROOT / "results")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "replicas.md")
    arguments = parser.parse_args()
    lab = Lab(is_quick=arguments.quick, traces=traces_folder(arguments.traces),
              output=arguments.output,
              command=["python", "-m", "experiments.replicas", *sys.argv[1:]])  # fmt: skip
    if arguments.draws is not None:
        run_draws(lab, arguments.document, arguments.draws)
    else:
        run(lab, arguments.document)


if __name__ == "__main__":
    main()
