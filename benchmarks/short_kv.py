"""KV for four requests on the device and more that want to run: what is preempting worth?

    python -m benchmarks.short_kv [--arms fcfs/recompute,learned/proactive] [--low-load]

Every policy and mode of preemption, in wall-clock time on this machine, beside what the simulator
makes of the same rows. One request in five wants 150-300 tokens, the others 8-32, behind prompts of
50-100; they come as one seeded Poisson stream at 0.95 × the measured throughput of FCFS that
recomputes. The device's pool holds four of mean size, the batch sixteen. The link to the host is
slowed down until the KV of a token takes a thousandth of a decode step to copy, as that of OPT-13B
does between an A100 and its host; `/unpaced` copies as fast as memory does. Order: A B C … C B A,
the way back with other arrivals, each run under a scheduler that knows nothing of those before.

The simulator is given the mean of two profiles of this process, before and after the runs of one
way, the link as measured, and the time that steps take beside the device, fitted to another run.
`at speed` repeats it with the first profile times what the run's own steps took over those
predicted for these very steps: what error is left is that of queues and copies alone.

--low-load: a pool for everybody, 0.3 × its capacity, the default policy and a host tier against
FCFS without one, in pairs A B, B A, …
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.command import command_parser, origin, run_command
from benchmarks.short_kv_figures import (
    Measured,
    Row,
    as_table,
    describe,
    describe_pairs,
    mean_jcts,
)
from benchmarks.short_kv_rig import FITTING_SEQS, MAX_NUM_SEQS, UNPACED, Arm, Rig, bandwidth_for
from benchmarks.short_kv_workload import (
    LONG_SHARE,
    LONG_TOKENS,
    PROMPT_TOKENS,
    SHORT_TOKENS,
    draw,
)
from benchmarks.small_model import NAMED, write_small_model
from benchmarks.timed_engine import Run, run_simulated
from experiments.validate_cpu import Beside, Speed, combined, profiled
from experiments.workload_traces import saturated_throughput
from fastserve.core.cost_model import CostModel
from fastserve.host.provenance import output_path
from fastserve.host.terminal import print_table
from fastserve.sim.sim_executor import StepOverhead
from fastserve.sim.workload import Workload

RESULTS = Path("benchmarks/results")
CAPACITY_REQUESTS = 40
MODES = ("recompute", "defer", "reactive", "proactive")
ARMS = (
    Arm("fcfs", "recompute"),
    Arm("fcfs", "proactive"),
    *(Arm(policy, mode) for policy in ("skip-join-mlfq", "learned") for mode in MODES),
    Arm("skip-join-mlfq", "proactive", is_paced=False),
)
HOST_TIER, DEVICE_ONLY = Arm("learned", "proactive"), Arm("fcfs", "recompute")
"""The pair of --low-load."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What was measured of this machine before the runs; a rig for each pace of the link."""

    rigs: Mapping[bool, Rig]
    cost: CostModel
    overhead: StepOverhead
    capacity: float  # requests/s that FCFS which recomputes completes

    def run(self, arm: Arm, workload: Workload) -> Measured:
        """Run an arm once."""
        speed = Speed(self.cost)
        run = self.rigs[arm.is_paced].run(arm, self.cost, workload, speed)
        return Measured(run, speed.factor)

    def simulated(self, arm: Arm, cost: CostModel, workload: Workload) -> Run:
        """Return what the simulator makes of an arm under these step times."""
        rig = self.rigs[arm.is_paced]
        return run_simulated(rig.config(arm), rig.machine(arm, cost, self.overhead), workload)

    def passes(self, args: argparse.Namespace, rate: float, progress: Progress) -> list[Row]:
        """Run all arms there and back, a profile before and after each way."""
        arms = args.arms
        bar = progress.add_task("arms", total=2 * len(arms))
        rows, before = [], self.cost
        for seed, order in enumerate((arms, arms[::-1]), start=args.seed + 1):
            workload = draw(max(round(rate * args.seconds), 5), rate, seed)
            runs = []
            for arm in order:
                runs.append((arm, self.run(arm, workload)))
                progress.advance(bar)
            after = profiled(self.rigs[True].engine)
            for arm, run in runs:
                plain = self.simulated(arm, combined((before, after)), workload)
                at_speed = self.simulated(arm, combined((self.cost,), run.speed_factor), workload)
                rows.append(Row(str(arm), run, plain, at_speed))
            before = after
        return rows

    def pairs(
        self, args: argparse.Namespace, rate: float, progress: Progress
    ) -> list[dict[str, Run]]:
        """Run the two of --low-load in turns."""
        pairs = []
        for number in progress.track(range(args.pairs), description="pairs"):
            workload = draw(max(round(rate * args.seconds), 5), rate, args.seed + 1 + number)
            order = (HOST_TIER, DEVICE_ONLY)[:: -1 if number % 2 else 1]
            pairs.append({str(arm): self.run(arm, workload).run for arm in order})
        return pairs


@contextlib.contextmanager
def opened(args: argparse.Namespace, folder: Path, console: Console) -> Iterator[Bench]:
    """Load, measure steps, slow the link down, measure what FCFS completes."""
    if args.model in NAMED:
        (folder / args.model).mkdir()
        write_small_model(folder / args.model, NAMED[args.model])
    with contextlib.ExitStack() as stack:
        unpaced = Rig.open(args, folder, None)
        stack.callback(unpaced.engine.close)
        cost = profiled(unpaced.engine)
        paced = Rig.open(args, folder, bandwidth_for(unpaced, cost))
        stack.callback(paced.engine.close)
        crowd = draw(args.capacity_requests, 1e9, args.seed)
        paced.run(HOST_TIER, cost, crowd.first(4), Beside())  # the first steps ever
        beside = Beside()
        run = paced.run(DEVICE_ONLY, cost, crowd, beside)
        jct_s = run.times.latencies()["jct_s"].tolist()
        fitting = MAX_NUM_SEQS if args.low_load else FITTING_SEQS
        capacity = saturated_throughput(jct_s, fitting)
        bench = Bench({True: paced, False: unpaced}, cost, beside.fitted(), capacity)
        console.print(f"{cost}\n{bench.overhead}\nlink {paced.link}, unpaced {unpaced.link}")
        console.print(f"FCFS completes {capacity:.2f} requests/s")
        yield bench


def measure(args: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Run everything and return the result."""
    with opened(args, folder, console) as bench:
        rate = args.load * bench.capacity
        with Progress(console=console, refresh_per_second=1) as progress:
            if args.low_load:
                pairs = bench.pairs(args, rate, progress)
                found = describe_pairs(pairs, str(HOST_TIER), str(DEVICE_ONLY))
            else:
                rows = bench.passes(args, rate, progress)
                block_bytes = bench.rigs[True].info.block_bytes
                found = {
                    "arms": [
                        describe([row for row in rows if row.arm == str(arm)], block_bytes)
                        for arm in args.arms
                    ],
                    "runs": [mean_jcts(row) for row in rows],
                }
        return {
            **origin("short_kv"),
            "model": args.model,
            "seed": args.seed,
            "lengths": {"prompt": PROMPT_TOKENS, "short": SHORT_TOKENS, "long": LONG_TOKENS,
                        "long_share": LONG_SHARE},
            "max_num_seqs": MAX_NUM_SEQS,
            "num_device_blocks": bench.rigs[True].info.num_device_blocks,
            "num_host_blocks": bench.rigs[True].info.num_host_blocks,
            "block_bytes": bench.rigs[True].info.block_bytes,
            "swap_bandwidth_gb_s": bandwidth_for(bench.rigs[True], bench.cost),
            "link": {name: bench.rigs[is_paced].link._asdict()
                     for name, is_paced in (("paced", True), (UNPACED, False))},
            "cost_model": dataclasses.asdict(bench.cost),
            "overhead_s": bench.overhead._asdict(),
            "capacity_requests_per_s": bench.capacity,
            "load": args.load,
            "requests_per_s": rate,
            **found,
        }  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """Read the command line; ConfigError for what cannot be run."""
    parser = command_parser("short_kv", __doc__)
    parser.add_argument("--arms", help=f"policy/mode[/{UNPACED}],… (all {len(ARMS)})")
    parser.add_argument("--low-load", action="store_true", help="what a host tier costs when idle")
    parser.add_argument("--pairs", type=int, default=20, help="of --low-load")
    parser.add_argument(
        "--model", default="llama-125m", help=f"what `serve` takes, or random: {', '.join(NAMED)}"
    )
    parser.add_argument("--load", type=float, help="over FCFS's throughput (0.95; low: 0.3)")
    parser.add_argument("--seconds", type=float, help="of arrivals of one run (17; low: 3)")
    parser.add_argument("--capacity-requests", type=int, default=CAPACITY_REQUESTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file (benchmarks/results/short_kv….json)")
    args = parser.parse_args()
    args.arms = [Arm.parse(text) for text in args.arms.split(",")] if args.arms else list(ARMS)
    args.load = args.load or (0.3 if args.low_load else 0.95)
    args.seconds = args.seconds or (3.0 if args.low_load else 17.0)
    name = "short_kv_low" if args.low_load else "short_kv"
    args.output = output_path(args.output or str(RESULTS / f"{name}.json"))
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # no profile of another day
        return measure(args, Path(folder), Console(stderr=True))


def show(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Print the table."""
    print_table(as_table(result))


def main() -> int:
    """Measure, write, print; exit code 2 for a run that cannot be."""
    return run_command(parse_arguments, run, show)


if __name__ == "__main__":
    sys.exit(main())
