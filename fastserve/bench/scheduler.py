"""`fastserve bench scheduler`: what deciding one step costs by live requests.

Rules: the real scheduler, in virtual time, before an executor that answers at once; only `schedule`
and `update` are timed. Requests that end are replaced, so that a row keeps its numbers.
Must not know: torch.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress
from rich.table import Table

from fastserve.bench.config import SchedulerBenchConfig
from fastserve.core.build import build_scheduler
from fastserve.core.cost_model import CostModel
from fastserve.core.messages import ExecutorOutput, Sample, SchedulerOutput, StepDone
from fastserve.core.request import Arrival, SamplingParams
from fastserve.core.scheduler import Scheduler
from fastserve.host.garbage_collector import quiet_garbage_collector
from fastserve.host.provenance import output_path, provenance, write_result
from fastserve.host.terminal import make_bar, make_table, print_table
from fastserve.settings.scheduler import SchedulerConfig, pool_window

PROMPT_TOKENS = (16, 256)
OUTPUT_TOKENS = (16, 1024)
WINDOW = 2048
BLOCK_SIZE = 16
WARM_UP_STEPS = 50
# Step times of the size of a 13-billion-parameter model on one data-centre GPU.
COST_MODEL = CostModel(base_s=0.02, prefill_token_s=1e-4, decode_seq_s=5e-5, decode_context_s=1e-7)


class Row(NamedTuple):
    """Cost of one schedule + update with so many requests."""

    waiting: int
    running: int
    sequences: float  # median number in a step
    median_ms: float
    p95_ms: float
    max_ms: float


class NullDevice:
    """Answers a plan at once with arbitrary ids; its clock moves by what the step would take."""

    def __init__(self) -> None:
        self.now = 0.0

    def run(self, plan: SchedulerOutput) -> ExecutorOutput:
        """Return the results of a plan."""
        seconds = COST_MODEL.step_s((work.num_tokens, work.start) for work in plan.work)
        self.now += seconds
        samples = [Sample(1) for work in plan.work if work.sample]
        return ExecutorOutput(steps=(StepDone(plan.step_id, samples, seconds),))


class Population:
    """A constant number of live requests; prompts differ, so that none is a prefix hit."""

    def __init__(self, scheduler: Scheduler, seed: int) -> None:
        self.scheduler = scheduler
        self.random = random.Random(seed)

    def add(self, count: int, now: float) -> None:
        """Add requests of random lengths."""
        for _ in range(count):
            length = self.random.randint(*PROMPT_TOKENS)
            prompt = [self.random.randrange(2, 50_000) for _ in range(length)]
            params = SamplingParams(
                max_tokens=self.random.randint(*OUTPUT_TOKENS), ignore_eos=True, seed=0
            )
            self.scheduler.add(Arrival(prompt, params), now)


def measure_row(config: SchedulerBenchConfig, waiting: int, running: int) -> Row:
    """Time the steps of one number of waiting and running requests."""
    blocks_each = -(-(PROMPT_TOKENS[1] + OUTPUT_TOKENS[1]) // BLOCK_SIZE)
    num_blocks = running * blocks_each
    scheduler = build_scheduler(
        SchedulerConfig(
            max_num_seqs=running,
            max_num_batched_tokens=max(2048, running),
            max_model_len=pool_window(WINDOW, num_blocks, BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            scheduling_policy=config.scheduling_policy,
        ),
        COST_MODEL,
        num_device_blocks=num_blocks,
    )
    quiet_garbage_collector()  # as the engine process does
    device, population = NullDevice(), Population(scheduler, seed=waiting + running)
    population.add(waiting + running, device.now)
    costs: list[float] = []
    sequences: list[int] = []
    for _ in range(WARM_UP_STEPS + config.steps):
        started = time.perf_counter()
        plan = scheduler.schedule(device.now, True)
        planned = time.perf_counter()
        if plan is None:
            raise RuntimeError("the scheduler has requests and plans nothing")
        output = device.run(plan)
        resumed = time.perf_counter()
        updates = scheduler.update(output, device.now)
        costs.append(time.perf_counter() - resumed + planned - started)
        sequences.append(len(plan.work))
        ended = sum(update.finish_reason is not None for update in updates)
        population.add(ended, device.now)
    timed = [cost * 1e3 for cost in costs[WARM_UP_STEPS:]]
    return Row(
        waiting=waiting,
        running=running,
        sequences=statistics.median(sequences[WARM_UP_STEPS:]),
        median_ms=statistics.median(timed),
        p95_ms=statistics.quantiles(timed, n=20, method="inclusive")[-1],
        max_ms=max(timed),
    )


def measure_scheduler(config: SchedulerBenchConfig) -> int:
    """Measure every row, print them and write them to the file asked for."""
    path = None if config.output is None else output_path(config.output)
    cases = [
        (waiting, running)
        for running in sorted({max(1, config.running // 16), config.running})
        for waiting in sorted({0, config.waiting // 10, config.waiting})
    ]
    rows = []
    with make_bar(*Progress.get_default_columns()) as progress:
        for waiting, running in progress.track(cases, description="measuring"):
            rows.append(measure_row(config, waiting, running))
    print_table(as_table(config.scheduling_policy, rows))
    if path is not None:
        write_rows(config, rows, path)
    return 0


def as_table(policy: str, rows: Sequence[Row]) -> Table:
    """Lay the rows out for people."""
    table = make_table(
        "waiting",
        "running",
        "in a step",
        "median",
        "p95",
        "max",
        title=f"Cost of schedule + update, {policy} (ms per step)",
    )
    for row in rows:
        table.add_row(
            f"{row.waiting:,}",
            f"{row.running:,}",
            f"{row.sequences:g}",
            f"{row.median_ms:.3f}",
            f"{row.p95_ms:.3f}",
            f"{row.max_ms:.3f}",
        )
    return table


def write_rows(config: SchedulerBenchConfig, rows: Sequence[Row], path: Path) -> None:
    """Write rows and provenance as JSON."""
    result = {
        **provenance(["fastserve", *sys.argv[1:]]),
        "scheduling_policy": config.scheduling_policy,
        "steps": config.steps,
        "rows": [row._asdict() for row in rows],
    }
    write_result(path, result)
