"""The doors of the engine: what does the work, what tells the time, what watches.

Rules: an executor fits `Executor` by shape, it does not inherit. Must not know: torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastserve.core.messages import ExecutorOutput, Fact, RequestUpdate, SchedulerOutput


class Executor(Protocol):
    """Carries out plans, in the order in which they are submitted.

    A step is a plan with work; as many are in flight at once as the SchedulerConfig was told when
    it was resolved. A plan without work takes no slot, may be submitted at any time and yields no
    StepDone: what it forgets is gone before the next plan begins. The copies of a plan begin when
    it is submitted, beside whatever runs; each is reported by its id, once, when it is done on
    every rank or has failed on one.
    """

    def can_submit(self) -> bool:
        """Whether a slot is free for a plan with work."""

    def submit(self, plan: SchedulerOutput) -> None:
        """Begin to carry out a plan and return at once."""

    def wait(self, until: float) -> ExecutorOutput | None:
        """Return every step and every copy that finished since the last call.

        Blocks until something has, `wake` was called, or the clock reaches `until`; None if
        nothing finished. A step that failed is a StepDone with an `error`, and its requests are
        known no more: what plans in flight still ask of them is not done. Raises RuntimeError when
        the device failed, or a plan without work did: the engine is then over.
        """

    def wake(self) -> None:
        """End a `wait` in progress, or the next one, early; callable from any thread."""

    def close(self) -> None:
        """Stop threads and processes and free the device."""


class Clock(Protocol):
    """Tells the time, in seconds from an arbitrary origin."""

    def now(self) -> float:
        """Return the current time."""


class Observer(Protocol):
    """Watches the engine; must not change anything.

    One that raises sees nothing further; under `is_strict` what it raised ends the engine.
    """

    def told(self, fact: Fact, now: float) -> None:
        """See a fact before the scheduler is told; it may refuse an Arrival with ValueError."""

    def planned(self, plan: SchedulerOutput | None, can_compute: bool, now: float) -> None:
        """See each answer of `schedule` before it is submitted; None: there was nothing to do."""

    def updated(self, output: ExecutorOutput, updates: Sequence[RequestUpdate], now: float) -> None:
        """See what finished and what it meant for requests."""
