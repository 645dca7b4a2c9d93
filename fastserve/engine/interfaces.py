"""The doors of the engine: what does the work, what tells the time, who watches.

Rules: an executor fits `Executor` by shape, it does not inherit. Must not know: torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastserve.core.messages import ExecutorOutput, RequestUpdate, SchedulerOutput


class Executor(Protocol):
    """Carries out plans, as many at once as its SchedulerConfig was told when it was resolved."""

    def can_submit(self) -> bool:
        """Whether a compute slot is free; copies never take one."""

    def submit(self, plan: SchedulerOutput) -> None:
        """Begin to carry out a plan and return at once."""

    def wait(self, until: float) -> ExecutorOutput | None:
        """Return everything that finished.

        Blocks until something has, `wake` was called, or the clock reaches `until`; None if
        nothing finished. A step that failed is a StepDone with an `error`, and its requests are
        known no more: what plans in flight still ask of them is not done. Raises RuntimeError when
        the device failed: the engine is then over.
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
    """Watches the engine; must not change anything."""

    def planned(self, plan: SchedulerOutput, now: float) -> None:
        """See a plan as it is submitted."""

    def updated(self, output: ExecutorOutput, updates: Sequence[RequestUpdate], now: float) -> None:
        """See what finished and what it meant for requests."""
