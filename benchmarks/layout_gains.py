"""The gain over FCFS by layout of ranks (experiment E9), live beside simulated.

    python -m benchmarks.layout_gains [--seconds 15] [--load 1.0]

Each layout that two cores can run, tensor × pipeline parallel with one thread of torch a rank,
takes Poisson arrivals at a share of what it completes itself under FCFS when all come at once. The
policies FCFS and skip-join MLFQ take turns over one loaded model, A B B A, the way back with other
arrivals. The gain is mean JCT under FCFS over that under skip-join MLFQ.

The simulator is given the mean of two profiles of the layout, before its runs and after them, and
the time that a step of one rank takes beside the device, fitted to the run that measures capacity.
`at speed` repeats it with the first profile times what the run's own steps took over those
predicted for these very steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

from benchmarks.command import command_parser, origin, run_command
from benchmarks.new_cache import use_new_cache
from benchmarks.predictions import PREDICTIONS, Row, as_table, describe, together
from benchmarks.short_kv_workload import LONG_SHARE, LONG_TOKENS, PROMPT_TOKENS, SHORT_TOKENS, draw
from benchmarks.small_model import NAMED, write_small_model
from benchmarks.timed_engine import Run, new_engine, run_live, run_simulated
from experiments.validate_cpu import Beside, Speed, combined, profiled
from experiments.workload_traces import saturated_throughput
from fastserve.core.cost_model import CostModel
from fastserve.engine.engine import Engine
from fastserve.engine.interfaces import Observer
from fastserve.host.garbage_collector import quiet_garbage_collector
from fastserve.host.provenance import output_path
from fastserve.host.terminal import print_table
from fastserve.launch.engine import open_engine
from fastserve.settings.engine import EngineConfig
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.sim_executor import StepOverhead
from fastserve.sim.simulator import Machine
from fastserve.sim.workload import Workload

RESULT = "benchmarks/results/layout_gains.json"
LAYOUTS = ((1, 1), (2, 1), (1, 2))
BASELINE, PAPER = "fcfs", "skip-join-mlfq"
ORDER = (BASELINE, PAPER, PAPER, BASELINE)
MAX_NUM_SEQS = 16  # of a step
NUM_DEVICE_BLOCKS = 1024  # of 16 tokens: more than the requests of two full steps take


class Layout(NamedTuple):
    """A layout that runs, and what was measured of it before its runs."""

    name: str
    engine: Engine
    cost: CostModel
    machine: Machine

    @classmethod
    def open(cls, model: Path, tensor: int, pipeline: int) -> Layout:
        """Load the model."""
        engine, info = open_engine(
            EngineConfig(
                model=str(model),
                load_format="dummy",
                device="cpu",
                num_threads=1,
                tensor_parallel_size=tensor,
                pipeline_parallel_size=pipeline,
                max_num_seqs=MAX_NUM_SEQS,
                num_device_blocks=NUM_DEVICE_BLOCKS,
                swap_space=0.0,
            )
        )
        cost = profiled(engine)
        machine = Machine(cost_model=cost, num_device_blocks=info.num_device_blocks)
        return cls(f"{tensor} × {pipeline}", engine, cost, machine)

    def config(self, policy: str) -> SchedulerConfig:
        """Return the settings of a scheduler."""
        return dataclasses.replace(self.engine.scheduler.config, scheduling_policy=policy)

    def run(self, policy: str, workload: Workload, *observers: Observer) -> Run:
        """Run a workload under a scheduler of its own."""
        engine = new_engine(self.engine.executor, self.config(policy), self.machine)
        engine.observers = observers
        return run_live(engine, workload)

    def simulated(
        self, policy: str, cost: CostModel, overhead: StepOverhead, workload: Workload
    ) -> Run:
        """Return what the simulator makes of it."""
        machine = dataclasses.replace(self.machine, cost_model=cost, overhead=overhead)
        return run_simulated(self.config(policy), machine, workload)


class Trial(NamedTuple):
    """One live run, and seconds that its steps took over those predicted for them."""

    policy: str
    workload: Workload
    run: Run
    speed_factor: float


def measure_layout(
    args: argparse.Namespace, layout: Layout, overhead: StepOverhead | None, progress: Progress
) -> tuple[list[Row], dict[str, Any], StepOverhead]:
    """Run one layout and simulate it; `overhead` is that of one rank, once it is known."""
    num_slots = layout.engine.scheduler.config.num_slots
    crowd = draw(args.capacity_requests, 1e9, args.seed)
    layout.run(BASELINE, crowd.first(4))  # the first steps ever
    beside = Beside()
    jct_s = layout.run(BASELINE, crowd, beside).times.latencies()["jct_s"].tolist()
    overhead = overhead or beside.fitted()
    capacity = saturated_throughput(jct_s, num_slots * MAX_NUM_SEQS)
    rate = args.load * capacity
    trials = []
    for index, policy in enumerate(progress.track(ORDER, description=layout.name)):
        seed = args.seed + 1 + 2 * index // len(ORDER)
        workload = draw(max(round(rate * args.seconds), 5), rate, seed)
        speed = Speed(layout.cost)
        run = layout.run(policy, workload, speed)
        # A step is billed a share of the machine: the stages' sum over the steps in flight.
        trials.append(Trial(policy, workload, run, speed.factor * num_slots))
        mean_s = run.times.latencies()["jct_s"].mean()
        progress.console.print(
            f"{layout.name}, {policy}: {len(workload)} requests, mean JCT {mean_s:.3f} s"
        )
    mean_cost = combined((layout.cost, profiled(layout.engine)))
    rows = []
    for policy, workload, run, factor in trials:
        costs = (mean_cost, combined((layout.cost,), factor))
        plain, at_speed = (
            layout.simulated(policy, cost, overhead, workload).times for cost in costs
        )
        labels = {"layout": layout.name, "policy": policy}
        rows.append(Row(labels, run.times, plain, at_speed, factor))
    facts = {
        "layout": layout.name,
        "cost_model": dataclasses.asdict(layout.cost),
        "capacity_requests_per_s": capacity,
        "requests_per_s": rate,
    }
    return rows, facts, overhead


def gains(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean JCT under FCFS over that under the paper's policy, live and predicted."""
    found = []
    for layout in dict.fromkeys(entry["layout"] for entry in entries):
        one, other = (
            next(e for e in entries if (e["layout"], e["policy"]) == (layout, policy))
            for policy in (BASELINE, PAPER)
        )
        gain = {"live": one["jct_s"]["mean"] / other["jct_s"]["mean"]}
        for name in PREDICTIONS:
            gain[name] = one[name]["jct_s"]["mean"] / other[name]["jct_s"]["mean"]
        found.append({"layout": layout, **gain})
    return found


def measure(args: argparse.Namespace, folder: Path, progress: Progress) -> dict[str, Any]:
    """Run every layout and return the result."""
    write_small_model(folder, NAMED[args.model])
    rows: list[Row] = []
    layouts: list[dict[str, Any]] = []
    overhead = None
    for tensor, pipeline in LAYOUTS:
        layout = Layout.open(folder, tensor, pipeline)
        try:
            quiet_garbage_collector()  # as the engine process does
            found, facts, overhead = measure_layout(args, layout, overhead, progress)
        finally:
            layout.engine.close()
        rows += found
        layouts.append(facts)
    assert overhead is not None
    entries = together(rows)
    return {
        **origin("layout_gains"),
        "model": args.model,
        "seed": args.seed,
        "threads_per_rank": 1,
        "max_num_seqs": MAX_NUM_SEQS,
        "num_device_blocks": NUM_DEVICE_BLOCKS,
        "lengths": {"prompt": PROMPT_TOKENS, "short": SHORT_TOKENS, "long": LONG_TOKENS,
                    "long_share": LONG_SHARE},
        "load": args.load,
        "overhead_s": overhead._asdict(),
        "layouts": layouts,
        "gains": gains(entries),
        "policies": entries,
        "runs": [describe([row]) for row in rows],
    }  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """Read the command line; ConfigError for what cannot be run."""
    parser = command_parser("layout_gains", __doc__)
    parser.add_argument("--model", default="llama-125m", choices=NAMED)
    parser.add_argument("--load", type=float, default=1.0, help="over FCFS's throughput (1.0)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of arrivals of one run (15)")
    parser.add_argument("--capacity-requests", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=RESULT, help=f"JSON file ({RESULT})")
    args = parser.parse_args()
    args.output = output_path(args.output)
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure in a folder of its own, with nothing kept of earlier runs."""
    with tempfile.TemporaryDirectory() as name, Progress(console=Console(stderr=True)) as bar:
        use_new_cache(Path(name))
        (Path(name) / args.model).mkdir()
        return measure(args, Path(name) / args.model, bar)


def show(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Print the table, and what each layout gains."""
    title = f"{args.load:g} × what FCFS completes of each layout"
    print_table(as_table(result["policies"], ["layout", "policy"], title))
    for each in result["gains"]:
        told = ", ".join(f"{name} {each[name]:.2f}" for name in ("live", *PREDICTIONS))
        print(f"{each['layout']}: gain over FCFS {told}")


def main() -> int:
    """Measure, write, print; exit code 2 for a run that cannot be."""
    return run_command(parse_arguments, run, show)


if __name__ == "__main__":
    sys.exit(main())
