"""Runs a workload through the engine in virtual time.

Rules: the very Engine, Scheduler and policies that serve; only the device and the clock are others.
Arrivals are fed in when they are due; answer lengths are known to the device alone, which draws
EOS there, and to `srpt`, which is told. Must not know: files, terminals, real time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastserve.core.build import build_scheduler
from fastserve.core.cost_model import CostModel
from fastserve.core.messages import RequestMetrics, RequestUpdate, SchedulerStats
from fastserve.core.policies.protocol import Policy
from fastserve.core.request import Arrival, SamplingParams
from fastserve.core.scheduler import Scheduler
from fastserve.engine.engine import Engine
from fastserve.engine.interfaces import Observer
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.clock import VirtualClock
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
    observers: Callable[[Scheduler], Sequence[Observer]] = lambda scheduler: (),
    on_step: OnStep | None = None,
    on_copy: OnCopy | None = None,
    on_progress: Callable[[int], None] = lambda num_ended: None,
) -> Outcome:
    """Run every row to its end and return what became of it.

    Every row must fit the window. A `policy` orders in place of the configured one. With
    `is_closed_loop` a turn of a session arrives `think_s` after the one before it has ended, not at
    its `arrived_at`. `on_progress` is told now and then how many have ended.
    """
    run = _Run(config, machine, workload, policy, is_closed_loop, on_step, on_copy)
    run.engine.observers = tuple(observers(run.engine.scheduler))
    while not run.is_over:
        for _ in range(STEPS_BETWEEN_REPORTS):
            if run.is_over:
                break
            run.step()
        on_progress(run.num_ended)
    return run.outcome()


class _Run:
    """One simulation under way. A row of the workload becomes a request when it is due."""

    def __init__(
        self,
        config: SchedulerConfig,
        machine: Machine,
        workload: Workload,
        policy: Policy | None,
        is_closed_loop: bool,
        on_step: OnStep | None,
        on_copy: OnCopy | None,
    ) -> None:
        self._workload = workload
        self._block_size = config.block_size
        self._prompts = workload.prompts()
        self._output_tokens = workload.output_tokens.tolist()
        self._params = self._sampling_params()
        self._clients = workload.client or ("",) * len(workload)
        self._ends: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        self._rows: list[int] = []  # by handle
        self._clock = VirtualClock()
        self._executor = SimExecutor(
            self._clock,
            machine.cost_model,
            self._ends,
            num_stages=config.num_slots,
            lookahead=config.lookahead,
            overhead=machine.overhead,
            on_step=on_step,
            on_copy=on_copy,
        )
        self._scheduler = build_scheduler(
            config,
            machine.cost_model,
            machine.num_device_blocks,
            machine.num_host_blocks,
            policy=policy,
            lengths=self._lengths,
        )
        self.engine = Engine(self._scheduler, self._executor, self._clock)
        self._next_turns = workload.next_turns() if is_closed_loop else {}
        later = set(self._next_turns.values())
        self._due = [
            (at, row) for row, at in enumerate(workload.arrived_at.tolist()) if row not in later
        ]
        heapq.heapify(self._due)
        num_rows = len(workload)
        self._last_token_at = [math.inf] * num_rows
        self._max_gap_s = [0.0] * num_rows
        self._metrics: list[RequestMetrics | None] = [None] * num_rows
        self.num_ended = 0
        self._peaks = Peaks()

    def _sampling_params(self) -> list[SamplingParams]:
        """Return what each row asks for; equal ones are one object."""
        if self._workload.max_tokens is None:
            return [SamplingParams(max_tokens=None)] * len(self._workload)
        limits = self._workload.max_tokens.tolist()
        known = {limit: SamplingParams(max_tokens=limit) for limit in set(limits)}
        return [known[limit] for limit in limits]

    @property
    def is_over(self) -> bool:
        """Whether nothing runs and nothing will come."""
        return not self._due and self.engine.is_idle

    def step(self) -> None:
        """Let the due arrivals in and turn the crank once."""
        due, now = self._due, self._clock.time
        while due and due[0][0] <= now:
            self._add(*heapq.heappop(due))
        for update in self.engine.step(due[0][0] if due else math.inf):
            self._take(update)
        self._note_peaks()

    def _note_peaks(self) -> None:
        cache, peaks = self._scheduler.cache, self._peaks
        on_device, on_host = cache.pool.num_used, cache.pool.num_host_used
        live = on_device + on_host - cache.pool.num_on_both
        if on_device > peaks.device_blocks:
            peaks.device_blocks = on_device
        if on_host > peaks.host_blocks:
            peaks.host_blocks = on_host
        if live > peaks.live_blocks:
            peaks.live_blocks = live
        if cache.num_tables > peaks.live_requests:
            peaks.live_requests = cache.num_tables

    def _add(self, due: float, row: int) -> None:
        handle, prompt = len(self._rows), self._prompts[row]
        self._rows.append(row)
        self._lengths[handle] = self._output_tokens[row]
        self._ends[handle] = len(prompt) + self._output_tokens[row]
        added = self.engine.add(
            Arrival(
                prompt,
                self._params[row],
                age_s=self._clock.time - due,
                block_hashes=self._prompts.block_hashes(row, self._block_size) or (),
                client=self._clients[row],
            )
        )
        assert added == handle

    def _take(self, update: RequestUpdate) -> None:
        row, now = self._rows[update.handle], self._clock.time
        gap_s = now - self._last_token_at[row]
        if gap_s > self._max_gap_s[row]:
            self._max_gap_s[row] = gap_s
        self._last_token_at[row] = now
        if update.metrics is not None:
            self._metrics[row] = update.metrics
            self.num_ended += 1
            following = self._next_turns.get(row)
            if following is not None:
                assert self._workload.think_s is not None
                think_s = float(self._workload.think_s[following])
                heapq.heappush(self._due, (now + think_s, following))

    def outcome(self) -> Outcome:
        """Return what became of everything."""
        ended = [metrics for metrics in self._metrics if metrics is not None]
        assert len(ended) == len(self._metrics), "a request has not ended"
        is_one_token = self._workload.output_tokens == 1
        return Outcome(
            arrived_at=np.array([metrics.arrival for metrics in ended]),
            first_token_at=np.array([metrics.first_token for metrics in ended], np.float64),
            finished_at=np.array([metrics.finished for metrics in ended]),
            max_gap_s=np.where(is_one_token, np.nan, self._max_gap_s),
            queue_s=np.array([metrics.queue_s for metrics in ended]),
            swap_s=np.array([metrics.swap_s for metrics in ended]),
            stats=self._scheduler.stats(),
            num_steps=self._executor.num_steps,
            busy_s=self._executor.busy_s,
            peaks=self._peaks,
        )
