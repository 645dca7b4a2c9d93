"""InFlight: the steps that an executor has begun, and the ends that it has not yet handed out.

Rules: one engine thread begins plans and waits; any thread tells what became of them, by a queue
that only `wait` reads, so that no state is shared. Steps are handed out in the order they began,
whatever the order they ended in; copies in the order they ended, beside the steps. A slot is free
again once `wait` has handed its step out, so that a plan never splits a batch that could run
together. A plan without work takes no slot and yields no StepDone, and a copy takes none. A failure
of the device, or of a plan without work, ends it all: `wait` raises it, after what can be handed
out before it; a copy that failed is news like any other. Waiting is on the queue, never polling.
Must not know: what carries a plan out.
"""

from __future__ import annotations

import math
import queue
import time
from typing import NamedTuple

from fastserve.core.messages import ExecutorOutput, SchedulerOutput, StepDone


class _CopyOver(NamedTuple):
    """A copy has ended."""

    copy_id: int
    is_done: bool


class _Failure(NamedTuple):
    """Nothing more can be carried out."""

    reason: str
    cause: BaseException | None


class _Wake:
    """There is something for the engine to do that the executor does not know of."""


class InFlight:
    """What `can_submit`, `wait` and `wake` of an executor come to."""

    def __init__(self, num_slots: int, lookahead: int) -> None:
        self._max_steps = num_slots + lookahead
        self._told: queue.SimpleQueue[StepDone | _CopyOver | _Failure | _Wake] = queue.SimpleQueue()
        self._steps: dict[int, StepDone | None] = {}  # None: still under way
        self._copies: list[int] = []
        self._failed_copies: list[int] = []
        self._is_woken = False
        self._failure: _Failure | None = None
        self.has_failed = False  # from `fail` on

    def can_begin(self) -> bool:
        """Whether a compute slot is free."""
        return len(self._steps) < self._max_steps

    def begin(self, plan: SchedulerOutput) -> None:
        """Take a slot for a plan with work. Raises RuntimeError where none is free."""
        if not plan.work:
            return
        if not self.can_begin():
            raise RuntimeError(f"step {plan.step_id} was submitted without a free slot")
        self._steps[plan.step_id] = None

    def finish(self, done: StepDone) -> None:
        """Say how a plan ended; where it took no slot, nothing comes of it."""
        self._told.put(done)

    def finish_copy(self, copy_id: int, is_done: bool) -> None:
        """Say that a copy is over, and whether its blocks are where they were to go."""
        self._told.put(_CopyOver(copy_id, is_done))

    def fail(self, reason: str, cause: BaseException | None = None) -> None:
        """Say that nothing more can be carried out, and why, in one line; the first one counts."""
        self.has_failed = True
        self._told.put(_Failure(reason, cause))

    def wake(self) -> None:
        """End a `wait` in progress, or the next one."""
        self._told.put(_Wake())

    def wait(self, until: float) -> ExecutorOutput | None:
        """Fit `Executor.wait`, by the machine's steady clock."""
        self._hear(0.0)
        while not (output := self._take()) and not (self._is_woken or self._failure):
            timeout_s = until - time.monotonic()
            if timeout_s <= 0.0:
                break
            self._hear(None if math.isinf(timeout_s) else timeout_s)
        self._is_woken = False
        if output is not None:
            return output
        if self._failure is not None:
            raise RuntimeError(self._failure.reason) from self._failure.cause
        return None

    def _hear(self, timeout_s: float | None) -> None:
        """Wait at most so long for anything to be told, and take in all that was."""
        try:
            self._take_in(self._told.get(timeout=timeout_s))
            while True:
                self._take_in(self._told.get_nowait())
        except queue.Empty:
            pass

    def _take_in(self, told: StepDone | _CopyOver | _Failure | _Wake) -> None:
        match told:
            case StepDone(step_id=step_id):
                if step_id in self._steps:
                    self._steps[step_id] = told
            case _CopyOver(copy_id, is_done):
                (self._copies if is_done else self._failed_copies).append(copy_id)
            case _Failure():
                self._failure = self._failure or told
            case _Wake():
                self._is_woken = True

    def _take(self) -> ExecutorOutput | None:
        """Take out the copies that are over, and the ended steps that none under way began before.

        None where there is nothing of either.
        """
        steps = []
        for done in self._steps.values():
            if done is None:
                break
            steps.append(done)
        if not (steps or self._copies or self._failed_copies):
            return None
        for done in steps:
            del self._steps[done.step_id]
        output = ExecutorOutput(tuple(steps), tuple(self._copies), tuple(self._failed_copies))
        self._copies.clear()
        self._failed_copies.clear()
        return output
