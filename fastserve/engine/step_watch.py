"""StepWatch: whether an engine gets on with what it has under way.

    the loop waits, nothing under way      nothing is due: an idle engine waits for ever
    the loop waits for steps, or copies    one must end within the limit, counted anew at each end
    the loop computes                      it must come back to waiting within the limit

Rules: an observer on the engine's thread, asked from another one, which must not wait for it: what
they share is replaced as a whole. The limit of steps and copies grows with what they are expected
to take, so that a large step of a slow machine is no hang; that is worked out only once they are
late, and costs the loop nothing.
Must not know: what becomes of an engine that hangs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastserve.core.cost_model import CostModel
from fastserve.core.messages import ExecutorOutput, Fact, RequestUpdate, SchedulerOutput
from fastserve.core.request import Handle

PATIENCE = 10.0
"""A step or a copy may take so many times what is expected of it, and the timeout beside that."""


class Hang(NamedTuple):
    """What hangs, in one line, and whose step it is, where it is one."""

    what: str
    handles: tuple[Handle, ...] = ()


class _Steps(NamedTuple):
    since: float  # when the one before it ended, or it was submitted
    oldest: SchedulerOutput


class _Copies(NamedTuple):
    since: float
    num_copies: int
    num_blocks: int


class StepWatch:
    """Fits `Observer`; `timeout_s` is what anything may take, whatever is expected of it.

    Steps may take `first_s` more until one has ended: a device may compile its kernels then.
    """

    def __init__(
        self, cost_model: CostModel, timeout_s: float, now: float, *, first_s: float = 0.0
    ) -> None:
        self._cost_model = cost_model
        self._timeout_s = timeout_s
        self._first_s = first_s
        self._plans: dict[int, SchedulerOutput] = {}  # in flight, in order
        self._blocks: dict[int, int] = {}  # of each copy in flight
        self._steps: _Steps | None = None
        self._copies: _Copies | None = None
        self._computing_since: float | None = now  # None: the loop waits

    def told(self, fact: Fact, now: float) -> None:
        """See a fact: the loop has something to compute."""
        self._computing_since = now

    def planned(self, plan: SchedulerOutput | None, can_compute: bool, now: float) -> None:
        """See what is submitted; nothing: the loop is about to wait."""
        if plan is None:
            self._computing_since = None
            return
        self._computing_since = now
        if plan.work:
            self._plans[plan.step_id] = plan
            if self._steps is None:
                self._steps = _Steps(now, plan)
        if plan.copies:
            self._blocks |= {copy.copy_id: len(copy.src) for copy in plan.copies}
            since = now if self._copies is None else self._copies.since
            self._copies = self._copies_since(since)

    def updated(self, output: ExecutorOutput, updates: Sequence[RequestUpdate], now: float) -> None:
        """See what has ended."""
        self._computing_since = now
        if output.steps:
            for step in output.steps:
                del self._plans[step.step_id]
            self._first_s = 0.0
            oldest = next(iter(self._plans.values()), None)
            self._steps = None if oldest is None else _Steps(now, oldest)
        if output.copies or output.failed_copies:
            for copy_id in (*output.copies, *output.failed_copies):
                del self._blocks[copy_id]
            self._copies = self._copies_since(now)

    def turned(self, now: float) -> None:
        """See the loop come back from waiting, whether or not anything has ended."""
        self._computing_since = now

    def overdue(self, now: float) -> Hang | None:
        """Return what hangs, if anything does; callable from any thread."""
        steps, copies, computing_since = self._steps, self._copies, self._computing_since
        timeout_s = self._timeout_s
        if computing_since is not None and now - computing_since > timeout_s:
            return Hang(f"the engine's loop has not come back for {now - computing_since:.1f} s")
        if steps is not None and now - steps.since > timeout_s + self._first_s:
            shares = [(work.num_tokens, work.start) for work in steps.oldest.work]
            expected_s = self._cost_model.step_s(shares)
            if now - steps.since > timeout_s + self._first_s + PATIENCE * expected_s:
                return Hang(
                    f"step {steps.oldest.step_id} has not ended for {now - steps.since:.1f} s; "
                    f"{expected_s:.2g} s were expected of it",
                    tuple(work.handle for work in steps.oldest.work),
                )
        if copies is not None and now - copies.since > timeout_s:
            model = self._cost_model
            expected_s = model.copy_base_s * copies.num_copies + model.copy_s(copies.num_blocks)
            if now - copies.since > timeout_s + PATIENCE * expected_s:
                return Hang(
                    f"none of {copies.num_copies} copies of KV has ended for "
                    f"{now - copies.since:.1f} s; {expected_s:.2g} s were expected of all"
                )
        return None

    def _copies_since(self, since: float) -> _Copies | None:
        if not self._blocks:
            return None
        return _Copies(since, len(self._blocks), sum(self._blocks.values()))
