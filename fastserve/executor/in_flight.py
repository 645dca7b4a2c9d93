"""InFlight: the steps that an executor has begun, and the ends that it has not yet handed out.

Rules: one engine thread begins plans and waits; any thread tells what became of them. Steps are
handed out in the order they began, whatever the order they ended in; copies in the order they
ended, beside the steps. A slot is free again once `wait` has handed its step out, so that a plan
never splits a batch that could run together. A plan without work takes no slot and yields no
StepDone, and a copy takes none. A failure of the device, or of a plan without work, ends it all:
`wait` raises it, after what can be handed out before it; a copy that failed is news like any other.
Waiting is on a condition, never polling. Must not know: what carries a plan out.
"""

from __future__ import annotations

import math
import threading
import time

from fastserve.core.messages import ExecutorOutput, SchedulerOutput, StepDone


class InFlight:
    """What `can_submit`, `wait` and `wake` of an executor come to."""

    def __init__(self, num_slots: int, lookahead: int) -> None:
        self._max_steps = num_slots + lookahead
        self._changed = threading.Condition()
        self._steps: dict[int, StepDone | None] = {}  # None: still under way
        self._copies: list[int] = []
        self._failed_copies: list[int] = []
        self._is_woken = False
        self._failure: tuple[str, BaseException | None] | None = None

    def can_begin(self) -> bool:
        """Whether a compute slot is free."""
        with self._changed:
            return len(self._steps) < self._max_steps

    def begin(self, plan: SchedulerOutput) -> None:
        """Take a slot for a plan with work. Raises RuntimeError where none is free."""
        if not plan.work:
            return
        with self._changed:
            if len(self._steps) >= self._max_steps:
                raise RuntimeError(f"step {plan.step_id} was submitted without a free slot")
            self._steps[plan.step_id] = None

    def finish(self, done: StepDone) -> None:
        """Say how a plan ended; where it took no slot, nothing comes of it."""
        with self._changed:
            if done.step_id in self._steps:
                self._steps[done.step_id] = done
                self._changed.notify_all()

    def finish_copy(self, copy_id: int, is_done: bool) -> None:
        """Say that a copy is over, and whether its blocks are where they were to go."""
        with self._changed:
            (self._copies if is_done else self._failed_copies).append(copy_id)
            self._changed.notify_all()

    def fail(self, reason: str, cause: BaseException | None = None) -> None:
        """Say that nothing more can be carried out, and why, in one line; the first one counts."""
        with self._changed:
            if self._failure is None:
                self._failure = reason, cause
                self._changed.notify_all()

    @property
    def has_failed(self) -> bool:
        """Whether `fail` was called."""
        return self._failure is not None

    def wait(self, until: float) -> ExecutorOutput | None:
        """Fit `Executor.wait`, by the machine's steady clock."""
        with self._changed:
            while not (output := self._take()) and not (self._is_woken or self._failure):
                timeout = until - time.monotonic()
                if timeout <= 0.0:
                    break
                self._changed.wait(None if math.isinf(timeout) else timeout)
            self._is_woken = False
            if output is not None:
                return output
            if self._failure is not None:
                reason, cause = self._failure
                raise RuntimeError(reason) from cause
            return None

    def wake(self) -> None:
        """End a `wait` in progress, or the next one."""
        with self._changed:
            self._is_woken = True
            self._changed.notify_all()

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
