"""Does the simulator predict this project's own engine on this machine?

    python -m experiments.validate_cpu [--requests N] [--load SHARE] [--rounds N] [--output FILE]

The bundled model is profiled, workloads are run for real (the engine in this process, wall-clock
time), and the same workloads are simulated from the profile. A shared machine is not the same
machine ten seconds later, so runs are short, there is a profile before and after each, and their
mean is simulated; rounds (baseline, policy, policy, baseline, each round another workload) are
averaged. The time that a step takes beside the device's, which no profile of the network holds, is
fitted to the steps of another workload, run before. Nothing is taken from the runs that are
compared but `speed_factor`: the seconds that their steps took over those predicted for these very
steps. It says how far the profiles were from the run, and the simulation is repeated at that speed:
what error is left is that of queue and overheads alone.
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
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from fastserve.core.cost_model import CostModel
from fastserve.core.messages import ExecutorOutput, Fact, RequestUpdate, SchedulerOutput
from fastserve.core.request import Arrival, SamplingParams
from fastserve.engine.engine import Engine
from fastserve.host.provenance import provenance
from fastserve.launch.engine import open_engine
from fastserve.settings.engine import EngineConfig
from fastserve.sim.generators import Lognormal, arrivals
from fastserve.sim.sim_executor import EOS_TOKEN_ID, StepOverhead
from fastserve.sim.simulator import Machine, simulate
from fastserve.sim.workload import Floats, Workload

POLICIES = ("fcfs", "skip-join-mlfq")
MAX_NUM_SEQS = 8
IDLE_S = 0.002  # from one step's end to the next one's plan; longer, and the engine was asleep
CALIBRATION_SEED = 1
PROMPTS = Lognormal(median=60, sigma=0.8, low=4, high=500)
OUTPUTS = Lognormal(median=40, sigma=1.2, low=2, high=800)


class Run(NamedTuple):
    """What a run took, and what the simulator says it takes."""

    policy: str
    speed_factor: float
    real_jct_s: dict[str, float]
    simulated_jct_s: dict[str, float]
    simulated_at_speed_jct_s: dict[str, float]


class Beside:
    """Watches how much longer steps take than the device says, by sequences in the step."""

    def __init__(self) -> None:
        self.last_at = -math.inf
        self.num_seqs = 0
        self.seconds: list[tuple[int, float]] = []

    def told(self, fact: Fact, now: float) -> None:
        """A fact takes no time of a step's."""

    def planned(self, plan: SchedulerOutput | None, can_compute: bool, now: float) -> None:
        """Note whether the engine came straight from the step before."""
        if plan is None or not plan.work:
            return
        self.num_seqs = len(plan.work)
        if now - self.last_at > IDLE_S:
            self.last_at = now

    def updated(self, output: ExecutorOutput, updates: Sequence[RequestUpdate], now: float) -> None:
        """Note the time since the step before, or since the engine woke, less the device's."""
        beside_s = now - self.last_at - sum(step.device_s for step in output.steps)
        self.seconds.append((self.num_seqs, beside_s))
        self.last_at = now

    def fitted(self) -> StepOverhead:
        """Return the least-squares line; sums matter to a queue, so it goes through the means."""
        num_seqs, beside_s = np.array(self.seconds).T
        per_seq_s, fixed_s = np.polyfit(num_seqs, beside_s, 1)
        return StepOverhead(max(float(fixed_s), 0.0), max(float(per_seq_s), 0.0))


class Speed:
    """Watches how long steps take against what the cost model says of them."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self.device_s = 0.0
        self.predicted_s = 0.0

    def told(self, fact: Fact, now: float) -> None:
        """A fact is no step."""

    def planned(self, plan: SchedulerOutput | None, can_compute: bool, now: float) -> None:
        """Add up the prediction."""
        shares = [(work.num_tokens, work.start) for work in plan.work] if plan is not None else []
        if shares:
            self.predicted_s += self.cost.step_s(shares)

    def updated(self, output: ExecutorOutput, updates: Sequence[RequestUpdate], now: float) -> None:
        """Add up what it took."""
        self.device_s += sum(step.device_s for step in output.steps)

    @property
    def factor(self) -> float:
        """Seconds taken over seconds predicted."""
        return self.device_s / self.predicted_s


def combined(costs: Sequence[CostModel], factor: float = 1.0) -> CostModel:
    """Return the mean of cost models, of a machine that takes `factor` times as long."""
    names = [spec.name for spec in dataclasses.fields(CostModel)]
    return CostModel(
        **{name: factor * sum(getattr(cost, name) for cost in costs) / len(costs) for name in names}
    )


def profiled(engine: Engine) -> CostModel:
    """Measure the step times now, not as they were on another day."""
    # Not before: how the threads of torch wait is settled by open_engine before it loads torch.
    from fastserve.executor.distributed import DistributedExecutor
    from fastserve.executor.fitting import fit
    from fastserve.executor.local import LocalExecutor

    executor = engine.executor
    assert isinstance(executor, LocalExecutor | DistributedExecutor)
    return fit(executor.measure(lambda stage, fraction: None))


def open_real(policy: str, num_threads: int) -> Engine:
    """Return the engine over the bundled model."""
    config = EngineConfig(
        scheduling_policy=policy,
        max_num_seqs=MAX_NUM_SEQS,
        enable_prefix_caching=False,
        num_threads=num_threads,
    )
    return open_engine(config)[0]


def greedy(num_output_tokens: int, seed: int) -> SamplingParams:
    """Ask for an exact length; greedy, as the steps of a profile are."""
    return SamplingParams(temperature=0.0, max_tokens=num_output_tokens, ignore_eos=True, seed=seed)


def measure_overhead(engine: Engine, workload: Workload) -> StepOverhead:
    """Fit the seconds beside the device to the steps of a run."""
    beside = Beside()
    engine.observers = (beside,)
    run_real(engine, workload)
    engine.observers = ()
    return beside.fitted()


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
            arrival = Arrival(prompt, params, age_s=time.monotonic() - start - due)
            row_of[engine.add(arrival)] = next_row
            next_row += 1
        until = start + rows[next_row][0] if next_row < len(rows) else math.inf
        for update in engine.step(until):
            if update.metrics is not None:
                metrics = update.metrics
                jct_s[row_of[update.handle]] = metrics.finished - metrics.arrival
    return jct_s


def run_simulated(
    engine: Engine, overhead: StepOverhead, cost: CostModel, workload: Workload
) -> Floats:
    """Return the completion time of each row as the simulator has it."""
    simulated_eos = frozenset({EOS_TOKEN_ID})
    scheduler_config = dataclasses.replace(engine.scheduler.config, eos_token_ids=simulated_eos)
    blocks = engine.scheduler.cache.pool.device.num_blocks
    machine = Machine(cost_model=cost, num_device_blocks=blocks, overhead=overhead)
    outcome = simulate(scheduler_config, machine, workload)
    return outcome.finished_at - outcome.arrived_at


def compare(policy: str, engine: Engine, workload: Workload, overhead: StepOverhead) -> Run:
    """Run a workload for real between two profiles of this very engine, and simulate it."""
    before = profiled(engine)
    speed = Speed(before)
    engine.observers = (speed,)
    real = run_real(engine, workload)
    engine.observers = ()
    costs = combined((before, profiled(engine))), combined((before,), speed.factor)
    simulated = (run_simulated(engine, overhead, cost, workload) for cost in costs)
    return Run(policy, speed.factor, figures(real), *map(figures, simulated))


def make_workload(num_requests: int, rate: float, seed: int = 0) -> Workload:
    """Return the lengths and arrivals, the same for every run."""
    rng = np.random.default_rng(seed)
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


def averaged(rows: Sequence[Run]) -> Run:
    """Return the mean of every figure over the runs of one policy."""
    tables = [[row.real_jct_s, row.simulated_jct_s, row.simulated_at_speed_jct_s] for row in rows]
    means = [
        {name: float(np.mean([table[name] for table in column])) for name in column[0]}
        for column in zip(*tables, strict=True)
    ]
    return Run(rows[0].policy, float(np.mean([row.speed_factor for row in rows])), *means)


def as_table(rows: Sequence[Run]) -> Table:
    """Lay the means out for people."""
    table = Table("policy", "JCT", "real", "simulated", "error", "speed", "at speed", "error")
    for row in rows:
        for name, real in row.real_jct_s.items():
            plain, at_speed = row.simulated_jct_s[name], row.simulated_at_speed_jct_s[name]
            table.add_row(
                row.policy,
                name,
                f"{real:.3f}",
                f"{plain:.3f}",
                f"{plain / real - 1:+.0%}",
                f"{row.speed_factor:.2f}",
                f"{at_speed:.3f}",
                f"{at_speed / real - 1:+.0%}",
            )
    return table


def main() -> None:
    """Validate and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=80, help="of one run")
    parser.add_argument("--rounds", type=int, default=4, help="of four runs each")
    parser.add_argument("--load", type=float, default=0.5, help="share of the predicted capacity")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/validate_cpu_load50.json"))
    args = parser.parse_args()
    console = Console(stderr=True)
    console.print("Profiling …")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        engines = {policy: open_real(policy, args.threads) for policy in POLICIES}
    first = engines[POLICIES[0]]
    cost = profiled(first)

    def paced(num_requests: int, seed: int, overhead: StepOverhead) -> Workload:
        """Return a workload that comes at the share of what the profile says can be done."""
        crowd = make_workload(args.requests, 1e9)
        busy_s = float(run_simulated(first, overhead, cost, crowd).max())
        return make_workload(num_requests, args.load * args.requests / busy_s, seed)

    trial = paced(args.requests // 4, CALIBRATION_SEED, StepOverhead())
    overhead = measure_overhead(first, trial)
    rate = paced(args.requests, 0, overhead).rate
    console.print(f"{rate:.1f} requests/s; overhead {overhead}")
    rows = []
    for round_index in range(args.rounds):
        workload = make_workload(args.requests, rate, CALIBRATION_SEED + 1 + round_index)
        for policy in (*POLICIES, *reversed(POLICIES)):
            rows.append(compare(policy, engines[policy], workload, overhead))
            console.print(rows[-1])
    summary = [averaged([row for row in rows if row.policy == policy]) for policy in POLICIES]
    console.print(as_table(summary))
    result = {
        **provenance([sys.executable.rsplit("/", 1)[-1], "-m", "experiments.validate_cpu"]),
        "requests": args.requests,
        "load": args.load,
        "rounds": args.rounds,
        "rate": rate,
        "overhead_s": overhead._asdict(),
        "mean_of_runs": [row._asdict() for row in summary],
        "runs": [row._asdict() for row in rows],
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    main()
