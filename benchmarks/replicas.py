"""Do live replicas behind the router do what the simulator says of them?

    python -m benchmarks.replicas [--policies fcfs,learned] [--seconds 30] [--load 0.8]

Two engine processes of one thread of torch each, placed by the API side that serves (AsyncEngine,
here without HTTP), take Poisson arrivals at a share of what the simulator says that both complete.
Order: A B B A, the way back with other arrivals; every run starts the engines anew, and neither a
policy nor the router knows anything of the runs before. A request asks for exactly the tokens
that its row says, live and simulated: `max_tokens` is all that is told of an answer's length.

Each start profiles both replicas at the same time, as they will run: memory bandwidth is shared.
The simulator (fastserve.sim.replicas: the same router, the same scheduler) is given the mean of the
profiles at the start of a run and at the start of the next, and the time that steps take beside
the device, fitted to the other runs. `at speed` repeats it with the run's own first profiles times
what its steps took over those predicted for these very steps: what error is left is that of
placing and queues alone. How steps went is read from the journals of the engines.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.command import command_parser, origin, run_command
from benchmarks.journals import Journalled, observe
from benchmarks.mixed_workload import NUM_IDS
from benchmarks.new_cache import forget_measurements, use_new_cache
from benchmarks.predictions import Row, as_table, describe, together
from benchmarks.short_kv_workload import LONG_SHARE, LONG_TOKENS, PROMPT_TOKENS, SHORT_TOKENS, draw
from benchmarks.small_model import NAMED, write_small_model
from experiments.validate_cpu import Beside, Speed, combined
from experiments.workload_traces import saturated_throughput
from fastserve.client.async_engine import AsyncEngine
from fastserve.client.streams import RequestStream
from fastserve.core.cost_model import CostModel
from fastserve.core.request import Arrival, SamplingParams
from fastserve.host.garbage_collector import quiet_garbage_collector
from fastserve.host.provenance import output_path
from fastserve.host.terminal import print_table
from fastserve.launch.server import open_async_engine
from fastserve.settings.engine import POLICIES, EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.sim.measures import Times
from fastserve.sim.replicas import simulate_replicas
from fastserve.sim.sim_executor import EOS_TOKEN_ID, StepOverhead
from fastserve.sim.simulator import Machine
from fastserve.sim.workload import Workload

RESULT = "benchmarks/results/replicas.json"
NUM_REPLICAS = 2
MAX_NUM_SEQS = 16
NUM_DEVICE_BLOCKS = 1024  # of 16 tokens: more than the sixteen longest requests take
STARTING_S = 0.5  # from the first word of a run to its first arrival


class Live(NamedTuple):
    """One run: when its rows were served, and what each engine wrote of it."""

    times: Times
    journals: Sequence[Path]


@dataclass(frozen=True, slots=True)
class Bench:
    """A model, and a folder for what engines keep: kernels between runs, nothing else."""

    model: str
    folder: Path

    def run(self, policy: str, workload: Workload) -> Live:
        """Start the replicas, which profile themselves, run a workload, and end them."""
        forget_measurements()
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        config = EngineConfig(
            model=self.model,
            load_format="dummy",
            device="cpu",
            num_threads=1,
            data_parallel_size=NUM_REPLICAS,
            scheduling_policy=policy,
            max_num_seqs=MAX_NUM_SEQS,
            num_device_blocks=NUM_DEVICE_BLOCKS,
            swap_space=0.0,
            journal=str(folder / "journal"),
        )
        times = asyncio.run(_serve(open_async_engine(config), workload))
        return Live(times, [folder / f"journal.{replica}" for replica in range(NUM_REPLICAS)])


async def _serve(engine: AsyncEngine, workload: Workload) -> Times:
    """Run a workload in wall-clock time once every replica is there."""
    await engine.start()
    try:
        await asyncio.gather(*(replica.ready() for replica in engine.replicas))
        quiet_garbage_collector()
        streams = await _submit(engine, workload)
        await engine.idle()
    finally:
        await engine.close()
    return _times_of(streams, workload)


async def _submit(engine: AsyncEngine, workload: Workload) -> list[RequestStream]:
    """Submit every row when it is due."""
    rng = random.Random(len(workload))
    prompts = [rng.choices(range(NUM_IDS), k=length) for length in workload.prompt_tokens.tolist()]
    outputs = workload.output_tokens.tolist()
    started_at, streams = time.monotonic() + STARTING_S, []
    for row, offset_s in enumerate(workload.arrived_at.tolist()):
        due = started_at + offset_s
        await asyncio.sleep(max(due - time.monotonic(), 0.0))
        params = SamplingParams(temperature=0.0, max_tokens=outputs[row], ignore_eos=True)
        arrival = Arrival(prompts[row], params, age_s=max(time.monotonic() - due, 0.0))
        streams.append(engine.submit(arrival))
    return streams


def _times_of(streams: Sequence[RequestStream], workload: Workload) -> Times:
    """Return when each answer began and ended; all have."""
    for stream, wanted in zip(streams, workload.output_tokens.tolist(), strict=True):
        if stream.error is not None:
            raise stream.error
        assert len(stream.output_token_ids) == wanted, "an answer is as long as it was to be"
    return Times(
        arrived_at=np.array([stream.arrived_at for stream in streams]),
        first_token_at=np.array([stream.first_token_at for stream in streams], np.float64),
        finished_at=np.array([stream.last_token_at for stream in streams]),
        max_gap_s=np.full(len(streams), np.nan),
        output_tokens=workload.output_tokens,
    )


def asked(num_requests: int, rate: float, seed: int) -> Workload:
    """Return rows that say how long an answer may be: exactly as long as it is."""
    drawn = draw(num_requests, rate, seed)
    return dataclasses.replace(drawn, max_tokens=drawn.output_tokens)


def costs_of(live: Live) -> list[CostModel]:
    """Return the profiles of a run's replicas."""
    return [observe(path, ()).cost_model for path in live.journals]


def fitted_overhead(lives: Iterable[Live]) -> StepOverhead:
    """Fit the seconds beside the device to the steps of all replicas of some runs."""
    pooled = Beside()
    for path in (path for live in lives for path in live.journals):
        beside = Beside()
        observe(path, (beside,))
        pooled.seconds += beside.seconds
    return pooled.fitted()


def capacity_of(first: Live, crowd: Workload) -> float:
    """Return the requests/s that replicas of these profiles complete, were there only devices."""
    told = observe(first.journals[0], ())
    jct_s = predicted(told, combined(costs_of(first)), StepOverhead(), crowd).latencies()["jct_s"]
    return saturated_throughput(jct_s.tolist(), NUM_REPLICAS * MAX_NUM_SEQS)


def speed_of(live: Live, cost: CostModel) -> tuple[float, list[Journalled]]:
    """Return seconds taken over those predicted, of the steps of all replicas, and what they are.

    One factor for all: the simulated machines are equal.
    """
    speed = Speed(cost)
    told = [observe(path, (speed,)) for path in live.journals]
    return speed.factor, told


def predicted(
    told: Journalled, cost: CostModel, overhead: StepOverhead, workload: Workload
) -> Times:
    """Return what the simulator makes of a workload."""
    at_eos = dataclasses.replace(told.config, eos_token_ids=frozenset({EOS_TOKEN_ID}))
    machine = Machine(cost_model=cost, num_device_blocks=told.num_device_blocks, overhead=overhead)
    outcome = simulate_replicas(at_eos, machine, workload, NUM_REPLICAS)
    return Times(
        arrived_at=outcome.arrived_at,
        first_token_at=outcome.first_token_at,
        finished_at=outcome.finished_at,
        max_gap_s=outcome.max_gap_s,
        output_tokens=workload.output_tokens,
    )


def compared(
    policy: str, workload: Workload, live: Live, after: Live, overhead: StepOverhead
) -> tuple[Row, dict[str, Any]]:
    """Return a run beside its simulations, and what else is known of it; `after` came next."""
    profiles = costs_of(live)
    own = combined(profiles)
    factor, told = speed_of(live, own)
    plain = predicted(told[0], combined([*profiles, *costs_of(after)]), overhead, workload)
    at_speed = predicted(told[0], combined([own], factor), overhead, workload)
    detail = {
        "placed": [each.num_requests for each in told],
        "overhead_s": overhead._asdict(),
        "profiles": [dataclasses.asdict(cost) for cost in profiles],
    }
    return Row({"policy": policy}, live.times, plain, at_speed, factor), detail


def measure(args: argparse.Namespace, bench: Bench, progress: Progress) -> dict[str, Any]:
    """Run everything, then simulate it, and return the result."""
    order = [*args.policies, *reversed(args.policies)]
    bar = progress.add_task("runs", total=len(order) + 2)
    crowd = asked(args.capacity_requests, 1e9, args.seed)

    def run(policy: str, workload: Workload) -> Live:
        live = bench.run(policy, workload)
        progress.advance(bar)
        mean_s = live.times.latencies()["jct_s"].mean()
        progress.console.print(f"{policy}: {len(workload)} requests, mean JCT {mean_s:.3f} s")
        return live

    capacity = capacity_of(run("fcfs", crowd.first(1)), crowd)
    rate = args.load * capacity
    workloads = [
        asked(max(round(rate * args.seconds), 8), rate, args.seed + 1 + index // len(args.policies))
        for index in range(len(order))
    ]
    runs = [run(policy, workload) for policy, workload in zip(order, workloads, strict=True)]
    last = run("fcfs", crowd.first(1))  # for its profiles
    rows, details = [], []
    for index, (policy, workload) in enumerate(zip(order, workloads, strict=True)):
        overhead = fitted_overhead([*runs[:index], *runs[index + 1 :]])
        after = [*runs, last][index + 1]
        row, detail = compared(policy, workload, runs[index], after, overhead)
        rows.append(row)
        details.append({**describe([row]), **detail})
    return {
        **origin("replicas"),
        "model": args.model,
        "seed": args.seed,
        "replicas": NUM_REPLICAS,
        "threads_per_replica": 1,
        "max_num_seqs": MAX_NUM_SEQS,
        "num_device_blocks": NUM_DEVICE_BLOCKS,
        "lengths": {"prompt": PROMPT_TOKENS, "short": SHORT_TOKENS, "long": LONG_TOKENS,
                    "long_share": LONG_SHARE},
        "capacity_requests_per_s": capacity,
        "load": args.load,
        "requests_per_s": rate,
        "policies": together(rows),
        "runs": details,
    }  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """Read the command line; ConfigError for what cannot be run."""
    parser = command_parser("replicas", __doc__)
    parser.add_argument("--policies", default="fcfs,learned")
    parser.add_argument("--model", default="llama-125m", choices=NAMED)
    parser.add_argument(
        "--load", type=float, default=0.8, help="over what both would complete (0.8)"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="of arrivals of one run (30)")
    parser.add_argument("--capacity-requests", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=RESULT, help=f"JSON file ({RESULT})")
    args = parser.parse_args()
    args.policies = args.policies.split(",")
    if unknown := set(args.policies) - set(POLICIES):
        raise ConfigError(f"--policies: no such policy: {', '.join(sorted(unknown))}")
    args.output = output_path(args.output)
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure in a folder of its own, with nothing kept of earlier runs."""
    with tempfile.TemporaryDirectory() as name, Progress(console=Console(stderr=True)) as bar:
        folder = Path(name)
        use_new_cache(folder)
        (folder / args.model).mkdir()
        write_small_model(folder / args.model, NAMED[args.model])
        return measure(args, Bench(str(folder / args.model), folder), bar)


def show(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Print the table, runs below policies."""
    title = f"{args.load:g} × what {NUM_REPLICAS} replicas would complete; below by run"
    print_table(as_table([*result["policies"], *result["runs"]], ["policy"], title))


def main() -> int:
    """Measure, write, print; exit code 2 for a run that cannot be."""
    return run_command(parse_arguments, run, show)


if __name__ == "__main__":
    sys.exit(main())
