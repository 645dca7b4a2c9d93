"""Runs a workload through several engines in virtual time, behind the router that serves.

Rules: one clock for all. The router decides when a row arrives, with what it knows by then, as it
does in the API process; a row stays where it was placed. Must not know: how work is estimated.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from math import inf

from fastserve.core.messages import ExecutorOutput, Fact, RequestUpdate, SchedulerOutput
from fastserve.core.routing import ReplicaFacts, Router
from fastserve.core.scheduler import Scheduler
from fastserve.engine.interfaces import Observer
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.clock import VirtualClock
from fastserve.sim.rows import Rows
from fastserve.sim.simulator import (
    STEPS_BETWEEN_REPORTS,
    Machine,
    Outcome,
    SimEngine,
    make_outcome,
)
from fastserve.sim.workload import Workload


def simulate_replicas(
    config: SchedulerConfig,
    machine: Machine,
    workload: Workload,
    num_replicas: int,
    *,
    is_closed_loop: bool = False,
    observers: Callable[[Scheduler], Sequence[Observer]] = lambda scheduler: (),
    on_progress: Callable[[int], None] = lambda num_ended: None,
) -> Outcome:
    """Run every row to its end on one of several equal machines; arguments as of `simulate`."""
    run = _Replicas(config, machine, workload, num_replicas, is_closed_loop, observers)
    num_moments = 0
    while run.go_on():
        num_moments += 1
        if num_moments % STEPS_BETWEEN_REPORTS == 0:
            on_progress(run.rows.num_ended)
    on_progress(run.rows.num_ended)
    return make_outcome(run.rows, run.engines)


def facts_of(config: SchedulerConfig, machine: Machine) -> ReplicaFacts:
    """Return what the router must know of a machine, whose stages share its time and its KV."""
    num_blocks = machine.num_device_blocks
    return ReplicaFacts(
        cost_model=machine.cost_model.shared_by(config.num_slots),
        max_num_seqs=config.max_num_seqs,
        max_request_tokens=config.max_model_len,
        block_size=config.block_size,
        num_kv_tokens=num_blocks * config.block_size // config.num_slots,
        num_cached_blocks=num_blocks if config.enable_prefix_caching else 0,
    )


class _News:
    """An observer that says whether anything has finished since it was last asked."""

    def __init__(self) -> None:
        self._has_come = False

    def told(self, fact: Fact, now: float) -> None:
        """A fact is no news: whoever told it goes on with a step."""

    def planned(self, plan: SchedulerOutput | None, can_compute: bool, now: float) -> None:
        """Nor is a plan."""

    def updated(self, output: ExecutorOutput, updates: Sequence[RequestUpdate], now: float) -> None:
        """Note it."""
        self._has_come = True

    def take(self) -> bool:
        """Return whether there was any, and forget it."""
        has_come, self._has_come = self._has_come, False
        return has_come


class _Replicas:
    """One simulation under way: engines on one clock, each due when something of it ends."""

    def __init__(
        self,
        config: SchedulerConfig,
        machine: Machine,
        workload: Workload,
        num_replicas: int,
        is_closed_loop: bool,
        observers: Callable[[Scheduler], Sequence[Observer]],
    ) -> None:
        self.rows = Rows(workload, config.block_size, is_closed_loop=is_closed_loop)
        self._clock = VirtualClock()
        self._router = Router(num_replicas)
        self._num_tokens = [0] * len(workload)  # of each row's answer
        self.engines: list[SimEngine] = []
        self._news: list[_News] = []
        for replica in range(num_replicas):
            engine = SimEngine(config, machine, self._clock, self.rows.output_tokens)
            news = _News()
            engine.engine.observers = (*observers(engine.scheduler), news)
            self._router.open(replica, facts_of(config, machine))
            self.engines.append(engine)
            self._news.append(news)
        self._next_at = [inf] * num_replicas
        self._agenda: list[tuple[float, int]] = []  # some of it out of date

    def go_on(self) -> bool:
        """Let time pass to the next moment at which anything happens; False when all is over."""
        while self._agenda and self._agenda[0][0] != self._next_at[self._agenda[0][1]]:
            heapq.heappop(self._agenda)
        next_end = self._agenda[0][0] if self._agenda else inf
        if next_end == self.rows.next_due == inf and all(e.engine.is_idle for e in self.engines):
            return False
        self._clock.wait(next_end, self.rows.next_due)
        touched = self._place()
        now = self._clock.time
        while self._agenda and self._agenda[0][0] <= now:
            at, replica = heapq.heappop(self._agenda)
            if at == self._next_at[replica]:
                touched.add(replica)
        for replica in sorted(touched):
            self._settle(replica, now)
        return True

    def _place(self) -> set[int]:
        """Give each row that is due to a replica; return those that were given any."""
        given: set[int] = set()
        while (due := self.rows.take_due(self._clock.time)) is not None:
            row, arrival = due
            replica = self._router.route(row, arrival)
            assert replica is not None
            self.engines[replica].add(row, arrival)
            given.add(replica)
        return given

    def _settle(self, replica: int, now: float) -> None:
        """Take in what has ended at this moment and submit what can run, until nothing is left."""
        engine, news = self.engines[replica], self._news[replica]
        while True:
            for row, update in engine.step(now):
                self._take(row, update, now)
            if not news.take():
                break
        next_at = min(engine.executor.next_end, engine.scheduler.next_event(now))
        self._next_at[replica] = next_at
        if next_at < inf:
            heapq.heappush(self._agenda, (next_at, replica))

    def _take(self, row: int, update: RequestUpdate, now: float) -> None:
        self.rows.take(row, update, now)
        self._num_tokens[row] += len(update.samples)
        if update.finish_reason is not None:
            self._router.ended(row, self._num_tokens[row])
        elif update.samples:
            self._router.grew(row, self._num_tokens[row])
