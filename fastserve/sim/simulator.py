"""Runs a workload through the engine in virtual time.

Rules: the very Engine, Scheduler and policies that serve; only the device and the clock are others.
Arrivals are fed in when they are due; answer lengths are known to the device alone, which draws
EOS there, and to `srpt`, which is told. Must not know: files, terminals, real time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from fastserve.core.build import build_scheduler
from fastserve.core.cost_model import CostModel
from fastserve.core.messages import RequestUpdate, SchedulerStats
from fastserve.core.policies.protocol import Policy
from fastserve.core.request import Arrival
from fastserve.core.scheduler import Scheduler
from fastserve.engine.engine import Engine
from fastserve.engine.interfaces import Observer
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.clock import VirtualClock
from fastserve.sim.rows import Rows
from fastserve.sim.sim_executor import OnCopy, OnStep, SimExecutor, StepOverhead
from fastserve.sim.workload import Floats, Workload

STEPS_BETWEEN_REPORTS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the workload runs on; `block_bytes` are those of a block over all devices."""

    cost_model: CostModel
    num_device_blocks: int
    num_host_blocks: int = 0
    block_bytes: int = 0
    overhead: StepOverhead = StepOverhead()  # noqa: RUF009 - an immutable tuple


@dataclass(slots=True)
class Peaks:
    """The most blocks that requests held on a tier and on either one, and the most that held any.

    Blocks on their way out count on neither tier.
    """

    device_blocks: int = 0
    host_blocks: int = 0
    live_blocks: int = 0
    live_requests: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What became of each row, in seconds, and of the machine. All rows have ended.

    `max_gap_s` is the longest pause between two tokens of an answer; NaN where there is one token.
    """

    arrived_at: Floats
    first_token_at: Floats
    finished_at: Floats
    max_gap_s: Floats
    queue_s: Floats
    swap_s: Floats
    stats: SchedulerStats
    num_steps: int
    busy_s: float
    peaks: Peaks


def simulate(
    config: SchedulerConfig,
    machine: Machine,
    workload: Workload,
    *,
    policy: Policy | None = None,
    is_closed_loop: bool = False,
    is_parallel: bool = False,
    observers: Callable[[Scheduler], Sequence[Observer]] = lambda scheduler: (),
    on_step: OnStep | None = None,
    on_copy: OnCopy | None = None,
    on_progress: Callable[[int], None] = lambda num_ended: None,
) -> Outcome:
    """Run every row to its end and return what became of it.

    Every row must fit the window. A `policy` orders in place of the configured one. With
    `is_closed_loop` a turn of a session arrives `think_s` after the one before it has ended, not at
    its `arrived_at`. With `is_parallel` the slots of the scheduler are machines beside each other,
    not stages of one. `on_progress` is told now and then how many have ended.
    """
    rows = Rows(workload, config.block_size, is_closed_loop=is_closed_loop)
    clock = VirtualClock()
    engine = SimEngine(
        config,
        machine,
        clock,
        rows.output_tokens,
        policy=policy,
        is_parallel=is_parallel,
        on_step=on_step,
        on_copy=on_copy,
    )
    engine.engine.observers = tuple(observers(engine.scheduler))
    num_steps = 0
    while rows.next_due < inf or not engine.engine.is_idle:
        while (due := rows.take_due(clock.time)) is not None:
            engine.add(*due)
        for row, update in engine.step(rows.next_due):
            rows.take(row, update, clock.time)
        num_steps += 1
        if num_steps % STEPS_BETWEEN_REPORTS == 0:
            on_progress(rows.num_ended)
    on_progress(rows.num_ended)
    return make_outcome(rows, [engine])


class SimEngine:
    """An engine over a simulated machine, whose requests are rows of a workload."""

    def __init__(
        self,
        config: SchedulerConfig,
        machine: Machine,
        clock: VirtualClock,
        output_tokens: Sequence[int],
        *,
        policy: Policy | None = None,
        is_parallel: bool = False,
        on_step: OnStep | None = None,
        on_copy: OnCopy | None = None,
    ) -> None:
        """`output_tokens` are those of every row, which the device alone knows (and `srpt`)."""
        self.peaks = Peaks()
        self._output_tokens = output_tokens
        self._ends: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        self._rows: list[int] = []  # by handle
        self.executor = SimExecutor(
            clock,
            machine.cost_model,
            self._ends,
            num_stages=config.num_slots,
            lookahead=config.lookahead,
            is_parallel=is_parallel,
            overhead=machine.overhead,
            on_step=on_step,
            on_copy=on_copy,
        )
        self.scheduler = build_scheduler(
            config,
            machine.cost_model,
            machine.num_device_blocks,
            machine.num_host_blocks,
            policy=policy,
            lengths=self._lengths,
        )
        self.engine = Engine(self.scheduler, self.executor, clock)

    def add(self, row: int, arrival: Arrival) -> None:
        """Take a row in."""
        handle = len(self._rows)
        self._rows.append(row)
        self._lengths[handle] = self._output_tokens[row]
        self._ends[handle] = len(arrival.prompt_token_ids) + self._output_tokens[row]
        added = self.engine.add(arrival)
        assert added == handle

    def step(self, until: float) -> Iterator[tuple[int, RequestUpdate]]:
        """Turn the crank once and yield the news by row."""
        updates = self.engine.step(until)
        self._note_peaks()
        for update in updates:
            yield self._rows[update.handle], update

    def _note_peaks(self) -> None:
        cache, peaks = self.scheduler.cache, self.peaks
        on_device, on_host = cache.pool.device.num_used, cache.pool.host.num_used
        live = on_device + on_host - cache.pool.num_on_both
        if on_device > peaks.device_blocks:
            peaks.device_blocks = on_device
        if on_host > peaks.host_blocks:
            peaks.host_blocks = on_host
        if live > peaks.live_blocks:
            peaks.live_blocks = live
        if cache.num_tables > peaks.live_requests:
            peaks.live_requests = cache.num_tables


def make_outcome(rows: Rows, engines: Sequence[SimEngine]) -> Outcome:
    """Return what became of everything; of several engines counts are sums, peaks those of each."""
    ended = rows.metrics()
    return Outcome(
        arrived_at=np.array([metrics.arrival for metrics in ended]),
        first_token_at=np.array([metrics.first_token for metrics in ended], np.float64),
        finished_at=np.array([metrics.finished for metrics in ended]),
        max_gap_s=rows.max_gap_s,
        queue_s=np.array([metrics.queue_s for metrics in ended]),
        swap_s=np.array([metrics.swap_s for metrics in ended]),
        stats=summed([engine.scheduler.stats() for engine in engines]),
        num_steps=sum(engine.executor.num_steps for engine in engines),
        busy_s=sum(engine.executor.busy_s for engine in engines),
        peaks=Peaks(
            **{
                spec.name: sum(getattr(engine.peaks, spec.name) for engine in engines)
                for spec in dataclasses.fields(Peaks)
            }
        ),
    )


def summed(stats: Sequence[SchedulerStats]) -> SchedulerStats:
    """Return the sums of several engines' figures; what each predicts apart has no sum."""
    if len(stats) == 1:
        return stats[0]
    sums: dict[str, Any] = {"forecasts": None, "requests_by_level": {}, "requests_by_work": ()}
    for spec in dataclasses.fields(SchedulerStats):
        if spec.name not in sums:
            sums[spec.name] = sum(getattr(one, spec.name) for one in stats)
    return SchedulerStats(**sums)
