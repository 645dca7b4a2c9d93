"""Does the simulator predict this project's own engine on this machine?

    python -m experiments.validate_cpu [--requests N] [--load SHARE] [--output FILE]

The bundled model is profiled, a workload is run for real (the engine in this process, wall-clock
time, in the order baseline, policy, policy, baseline), and the same workload is simulated from the
profile. The time that a step takes beside the device's, which no profile of the network holds, is
measured in closed batches before, never in the runs that are compared.

A shared machine is not the same machine a minute later. So each run is also simulated at its own
speed: all device times scaled by one number, the seconds its steps took over those predicted for
these very steps. What is left then is the error of scheduler, queue and overheads alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fastserve.config import EngineConfig
from fastserve.core.cost_model import CostModel
from fastserve.core.output import ExecutorOutput, RequestUpdate, SchedulerOutput
from fastserve.core.request import SamplingParams
from fastserve.engine.engine import Engine
from fastserve.launch import open_engine
from fastserve.provenance import provenance
from fastserve.sim.generators import Lognormal, arrivals
from fastserve.sim.sim_executor import EOS_TOKEN_ID, StepOverhead
from fastserve.sim.simulator import Machine, simulate
from fastserve.sim.workload import Floats, Workload

POLICIES = ("fcfs", "skip-join-mlfq")
MAX_NUM_SEQS = 8
PROMPTS = Lognormal(median=60, sigma=0.8, low=4, high=500)
OUTPUTS = Lognormal(median=40, sigma=1.2, low=2, high=800)


class Beside:
    """Watches how much longer a saturated step takes than the device says."""

    def __init__(self) -> None:
        self.last_at = math.nan
        self.seconds: list[float] = []

    def planned(self, plan: SchedulerOutput, now: float) -> None:
        """Fit `Observer`."""

    def updated(self, output: ExecutorOutput, updates: Sequence[RequestUpdate], now: float) -> None:
        """Note the time since the step before, less the device's."""
        self.seconds.append(now - self.last_at - sum(step.device_s for step in output.steps))
        self.last_at = now


class Speed:
    """Watches how long steps take against what the cost model says of them."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self.device_s = 0.0
        self.predicted_s = 0.0

    def planned(self, plan: SchedulerOutput, now: float) -> None:
        """Add up the prediction."""
        self.predicted_s += self.cost.step_s((work.num_tokens, work.start) for work in plan.work)

    def updated(self, output: ExecutorOutput, updates: Sequence[RequestUpdate], now: float) -> None:
        """Add up what it took."""
        self.device_s += sum(step.device_s for step in output.steps)

    @property
    def factor(self) -> float:
        """Seconds taken over seconds predicted."""
        return self.device_s / self.predicted_s


def scaled(cost: CostModel, factor: float) -> CostModel:
    """Return the cost model of a machine that takes `factor` times as long."""
    return CostModel(
        **{spec.name: getattr(cost, spec.name) * factor for spec in dataclasses.fields(cost)}
    )


def open_real(policy: str, num_threads: int) -> Engine:
    """Return the engine over the bundled model."""
    config = EngineConfig(
        scheduling_policy=policy, max_num_seqs=MAX_NUM_SEQS, enable_prefix_caching=False
    )
    return open_engine(config, num_threads=num_threads)[0]


def greedy(num_output_tokens: int, seed: int) -> SamplingParams:
    """Ask for an exact length; greedy, as the steps of a profile are."""
    return SamplingParams(temperature=0.0, max_tokens=num_output_tokens, ignore_eos=True, seed=seed)


def measure_overhead(engine: Engine, num_steps: int = 300) -> StepOverhead:
    """Fit fixed and per-sequence seconds beside the device from closed batches of 1 and of all."""
    medians = {}
    for batch in (1, MAX_NUM_SEQS):
        beside = Beside()
        engine.observers = (beside,)
        for seed in range(batch):
            params = greedy(num_steps, seed)
            engine.add(list(range(10, 42)), params)
        while not engine.is_idle:
            engine.step()
        medians[batch] = float(np.median(beside.seconds[20:-20]))
    engine.observers = ()
    per_seq_s = max((medians[MAX_NUM_SEQS] - medians[1]) / (MAX_NUM_SEQS - 1), 0.0)
    return StepOverhead(max(medians[1] - per_seq_s, 0.0), per_seq_s)


def run_real(engine: Engine, workload: Workload) -> Floats:
    """Return the completion time of each row, run in wall-clock time."""
    rng = np.random.default_rng(1)
    columns = (workload.arrived_at, workload.prompt_tokens, workload.output_tokens)
    rows = list(zip(*columns, strict=True))
    jct_s = np.full(len(rows), math.nan)
    row_of: dict[int, int] = {}
    start, next_row = time.monotonic(), 0
    while next_row < len(rows) or not engine.is_idle:
        while next_row < len(rows) and start + rows[next_row][0] <= time.monotonic():
            due, num_prompt, num_output = rows[next_row]
            prompt = rng.integers(10, 3000, num_prompt).tolist()
            params = greedy(int(num_output), next_row)
            row_of[engine.add(prompt, params, arrived_at=start + due)] = next_row
            next_row += 1
        until = start + rows[next_row][0] if next_row < len(rows) else math.inf
        for update in engine.step(until):
            if update.metrics is not None:
                metrics = update.metrics
                jct_s[row_of[update.request]] = metrics.finished - metrics.arrival
    return jct_s


def run_simulated(
    engine: Engine, overhead: StepOverhead, cost: CostModel, workload: Workload
) -> Floats:
    """Return the completion time of each row as the simulator has it."""
    simulated_eos = frozenset({EOS_TOKEN_ID})
    scheduler_config = dataclasses.replace(engine.scheduler.config, eos_token_ids=simulated_eos)
    blocks = engine.scheduler.cache.pool.num_device_blocks
    machine = Machine(cost_model=cost, num_device_blocks=blocks, overhead=overhead)
    outcome = simulate(scheduler_config, machine, workload)
    return outcome.finished_at - outcome.arrived_at


def make_workload(num_requests: int, rate: float) -> Workload:
    """Return the lengths and arrivals, the same for every run."""
    rng = np.random.default_rng(0)
    outputs = OUTPUTS.draw(rng, num_requests)
    return Workload(
        arrived_at=arrivals(rng, num_requests, rate),
        prompt_tokens=PROMPTS.draw(rng, num_requests),
        output_tokens=outputs,
        max_tokens=outputs,
    )


def figures(jct_s: Floats) -> dict[str, float]:
    """Return what is compared."""
    return {"mean": float(jct_s.mean()), "p95": float(np.percentile(jct_s, 95))}


def as_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Lay the runs out for people."""
    table = Table("policy", "JCT", "real", "simulated", "error", "speed", "at speed", "error")
    for row in rows:
        for name, real in row["real_jct_s"].items():
            plain, at_speed = row["simulated_jct_s"][name], row["simulated_at_speed_jct_s"][name]
            table.add_row(
                row["policy"],
                name,
                f"{real:.3f}",
                f"{plain:.3f}",
                f"{plain / real - 1:+.0%}",
                f"{row['speed_factor']:.2f}",
                f"{at_speed:.3f}",
                f"{at_speed / real - 1:+.0%}",
            )
    return table


def main() -> None:
    """Validate and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=250)
    parser.add_argument("--load", type=float, default=0.5, help="share of the predicted capacity")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/validate_cpu_load50.json"))
    args = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # a profile of today, not of another day
        console.print("Profiling …")
        engines = {policy: open_real(policy, args.threads) for policy in POLICIES}
        cost = engines["fcfs"].executor.cost_model()  # type: ignore[attr-defined]
    overhead = measure_overhead(engines["fcfs"])
    crowd = make_workload(args.requests, 1e9)
    busy = run_simulated(engines["fcfs"], overhead, cost, crowd).max()
    workload = make_workload(args.requests, args.load * args.requests / float(busy))
    console.print(f"{workload.rate:.1f} requests/s, {busy:.1f} s of work; overhead {overhead}")
    rows = []
    for policy in (*POLICIES, *reversed(POLICIES)):
        engine, speed = engines[policy], Speed(cost)
        engine.observers = (speed,)
        real = figures(run_real(engine, workload))
        engine.observers = ()
        rows.append(
            {
                "policy": policy,
                "speed_factor": speed.factor,
                "real_jct_s": real,
                "simulated_jct_s": figures(run_simulated(engine, overhead, cost, workload)),
                "simulated_at_speed_jct_s": figures(
                    run_simulated(engine, overhead, scaled(cost, speed.factor), workload)
                ),
            }
        )
        console.print(rows[-1])
    console.print(as_table(rows))
    result = {
        **provenance([sys.executable.rsplit("/", 1)[-1], "-m", "experiments.validate_cpu"]),
        "requests": args.requests,
        "load": args.load,
        "rate": workload.rate,
        "overhead_s": overhead._asdict(),
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    main()
