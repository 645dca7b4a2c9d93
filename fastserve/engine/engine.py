"""The engine: the only loop there is, between a scheduler that decides and an executor that does.

Rules: `step` is called by one thread; observers watch, and cannot stop a live engine; a step that
fails ends the requests in it, a device that fails ends the engine. Live serving, offline use and
virtual time run these very lines.
Must not know: torch, processes, text.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

from fastserve.core.messages import (
    Aborted,
    ExecutorOutput,
    Fact,
    Finished,
    RequestUpdate,
    SchedulerOutput,
)
from fastserve.core.request import Arrival, Handle
from fastserve.core.scheduler import Scheduler
from fastserve.engine.interfaces import Clock, Executor, Observer
from fastserve.wire.engine_messages import EngineStats
from fastserve.wire.step_sizes import StepSizes

logger = logging.getLogger(__name__)


class MonotonicClock:
    """The machine's steady clock; equal in every process of a host."""

    def now(self) -> float:
        """Return the current time."""
        return time.monotonic()


class Engine:
    """Turns the crank for one scheduler and one executor."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        clock: Clock,
        observers: Sequence[Observer] = (),
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.clock = clock
        self.observers = tuple(observers)
        self._on_close = on_close or executor.close
        self.scheduler_s = 0.0  # in deciding: schedule and update
        self.device_s = 0.0  # in steps, as the executor reports them
        self.step_sizes = StepSizes()

    def step(self, until: float = math.inf) -> list[RequestUpdate]:
        """Submit all that can run, wait for the next thing to finish, and return the news."""
        self._submit_plans()
        done = self.executor.wait(min(until, self.scheduler.next_event(self.clock.now())))
        updates = self._update(done) if done else []
        self._tidy()
        return updates

    def _submit_plans(self) -> None:
        while plan := self._schedule():
            self.executor.submit(plan)

    def _tidy(self) -> None:
        """Let the executor forget the last requests: an idle engine may never be stepped again."""
        if self.is_idle:
            self._submit_plans()

    def _schedule(self) -> SchedulerOutput | None:
        now = self.clock.now()
        can_compute = self.executor.can_submit()
        plan = self.scheduler.schedule(now, can_compute)
        self.scheduler_s += self.clock.now() - now
        if plan is not None and plan.work:
            self.step_sizes.add(plan.num_tokens)
        self._notify(lambda observer: observer.planned(plan, can_compute, now))
        return plan

    def _update(self, done: ExecutorOutput) -> list[RequestUpdate]:
        now = self._tell(done)
        begun = self.clock.now()
        updates = self.scheduler.update(done, now)
        self.scheduler_s += self.clock.now() - begun
        self.device_s += sum(step.device_s for step in done.steps)
        self._notify(lambda observer: observer.updated(done, updates, now))
        return updates

    def _tell(self, fact: Fact) -> float:
        """Show the observers a fact that the scheduler is about to be told; return its time."""
        now = self.clock.now()
        self._notify(lambda observer: observer.told(fact, now))
        return now

    def _notify(self, see: Callable[[Observer], None]) -> None:
        for observer in self.observers:
            try:
                see(observer)
            except Exception as error:
                if self.scheduler.config.is_strict:
                    raise
                logger.error(
                    "the engine goes on without its %s: %s",
                    type(observer).__name__,
                    error,
                    exc_info=not isinstance(error, OSError),  # a full disk needs no traceback
                )
                self.observers = tuple(item for item in self.observers if item is not observer)

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return self.scheduler.num_requests

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to run, and nothing that ended still holds memory."""
        scheduler = self.scheduler
        in_flight = scheduler.num_steps_in_flight or scheduler.num_copies_in_flight
        return not self.num_requests and not in_flight

    def add(self, arrival: Arrival) -> Handle:
        """Accept a request and return its handle; ValueError if it can never run."""
        return self.scheduler.add(arrival, self._tell(arrival))

    def abort(self, handle: Handle) -> RequestUpdate | None:
        """End a request; return its terminal update, None if it has ended already."""
        update = self.scheduler.abort(handle, self._tell(Aborted(handle)))
        self._tidy()
        return update

    def finish(self, handle: Handle, num_output_tokens: int) -> RequestUpdate | None:
        """End a request at a stop string; return its terminal update, None if it has ended."""
        now = self._tell(Finished(handle, num_output_tokens))
        update = self.scheduler.finish(handle, num_output_tokens, now)
        self._tidy()
        return update

    def stats(self) -> EngineStats:
        """Return a snapshot."""
        now = self.clock.now()
        return EngineStats(
            scheduler=self.scheduler.stats(),
            num_requests=self.num_requests,
            scheduler_s=self.scheduler_s,
            device_s=self.device_s,
            steps_by_tokens=self.step_sizes.counts,
            step_tokens=self.step_sizes.total,
            at=now,
        )

    def close(self) -> None:
        """Stop the executor and let go of everything opened with it; the engine is over."""
        self._on_close()
