"""A workload through an engine of this process, in wall-clock time and in the simulator.

Rules: a request asks for as much as the window holds and is ended when it has what its row says, as
a stop string ends one, so that no policy knows more than it would of people's requests; in the
simulator EOS ends it at the same token. One executor serves many runs, each under a scheduler of
its own that knows nothing of the ones before.
Must not know: what is compared, files, terminals.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from dataclasses import dataclass

import numpy as np

from benchmarks.mixed_workload import NUM_IDS
from fastserve.core.build import build_scheduler
from fastserve.core.messages import RequestMetrics, RequestUpdate, SchedulerStats
from fastserve.core.request import Arrival, Handle, SamplingParams
from fastserve.engine.engine import Engine, MonotonicClock
from fastserve.engine.interfaces import Executor
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.measures import Times
from fastserve.sim.sim_executor import EOS_TOKEN_ID
from fastserve.sim.simulator import Machine, simulate
from fastserve.sim.workload import Workload

UNLIMITED = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """When each row of a workload was served, and what the scheduler counted."""

    times: Times
    stats: SchedulerStats

    @property
    def makespan_s(self) -> float:
        """From the first arrival to the last answer's end."""
        return float(self.times.finished_at.max() - self.times.arrived_at.min())


def new_engine(executor: Executor, config: SchedulerConfig, machine: Machine) -> Engine:
    """Return an engine with a scheduler of its own over an executor that is idle."""
    scheduler = build_scheduler(
        config, machine.cost_model, machine.num_device_blocks, machine.num_host_blocks
    )
    return Engine(scheduler, executor, MonotonicClock())


def run_live(engine: Engine, workload: Workload) -> Run:
    """Run a workload whose rows come when they are due; the engine is idle before and after."""
    live = _Live(engine, workload)
    while not live.is_over:
        live.step()
    return live.result()


def run_simulated(config: SchedulerConfig, machine: Machine, workload: Workload) -> Run:
    """Run the same workload in virtual time."""
    at_eos = dataclasses.replace(config, eos_token_ids=frozenset({EOS_TOKEN_ID}))
    outcome = simulate(at_eos, machine, workload)
    times = Times(
        arrived_at=outcome.arrived_at,
        first_token_at=outcome.first_token_at,
        finished_at=outcome.finished_at,
        max_gap_s=outcome.max_gap_s,
        output_tokens=workload.output_tokens,
    )
    return Run(times, outcome.stats)


@dataclass(slots=True)
class _Answer:
    """What has come of a row's answer."""

    row: int
    wanted: int
    num_tokens: int = 0
    last_at: float = math.inf
    max_gap_s: float = 0.0


class _Live:
    """One run under way."""

    def __init__(self, engine: Engine, workload: Workload) -> None:
        self._engine = engine
        self._workload = workload
        rng = random.Random(len(workload))
        self._prompts = [
            rng.choices(range(NUM_IDS), k=length) for length in workload.prompt_tokens.tolist()
        ]
        self._due = workload.arrived_at.tolist()
        self._wanted = workload.output_tokens.tolist()
        self._answers: dict[Handle, _Answer] = {}
        self._metrics: list[RequestMetrics | None] = [None] * len(workload)
        self._max_gap_s = np.full(len(workload), math.nan)
        self._next_row = 0
        self._started_at = time.monotonic()

    @property
    def is_over(self) -> bool:
        return self._next_row == len(self._due) and self._engine.is_idle

    def step(self) -> None:
        """Let the due rows in and turn the crank once."""
        while (due := self._next_due()) <= time.monotonic():
            self._add(due)
        for update in self._engine.step(self._next_due()):
            self._take(update, time.monotonic())

    def _next_due(self) -> float:
        if self._next_row == len(self._due):
            return math.inf
        return self._started_at + self._due[self._next_row]

    def _add(self, due: float) -> None:
        row = self._next_row
        self._next_row += 1
        arrival = Arrival(self._prompts[row], UNLIMITED, age_s=time.monotonic() - due)
        self._answers[self._engine.add(arrival)] = _Answer(row, self._wanted[row])

    def _take(self, update: RequestUpdate, now: float) -> None:
        if update.error is not None:
            raise RuntimeError(update.error)
        answer = self._answers[update.handle]
        answer.num_tokens += len(update.samples)
        answer.max_gap_s = max(answer.max_gap_s, now - answer.last_at)
        answer.last_at = now
        if answer.num_tokens < answer.wanted:
            return
        ended = self._engine.finish(update.handle, answer.wanted)
        assert ended is not None, "nothing else ends a request"
        self._metrics[answer.row] = ended.metrics
        if answer.wanted > 1:
            self._max_gap_s[answer.row] = answer.max_gap_s

    def result(self) -> Run:
        """Return what became of all rows."""
        metrics = [each for each in self._metrics if each is not None]
        assert len(metrics) == len(self._metrics), "a request has not ended"
        times = Times(
            arrived_at=np.array([each.arrival for each in metrics]),
            first_token_at=np.array([each.first_token for each in metrics], np.float64),
            finished_at=np.array([each.finished for each in metrics]),
            max_gap_s=self._max_gap_s,
            output_tokens=self._workload.output_tokens,
        )
        return Run(times, self._engine.scheduler.stats())
