"""InFlight against a naive model, and its waiting and waking between threads."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from fastserve.core.messages import ExecutorOutput, SchedulerOutput, StepDone
from fastserve.core.request import Handle
from fastserve.executor.in_flight import InFlight
from tests.core.builders import make_work


def plan(step_id: int, *, has_work: bool = True) -> SchedulerOutput:
    """Return a plan of one decode, or one that only forgets."""
    work = make_work(handle=step_id, start=3, token_ids=(7,))
    return SchedulerOutput(
        step_id, (), (work,) if has_work else (), forget=(Handle(step_id + 1000),)
    )


def done(step_id: int, error: str | None = None) -> StepDone:
    """Return the end of a step."""
    return StepDone(step_id, (), 0.5, error=error)


@dataclass
class Model:
    """What an executor owes: every step that began, once, in order; copies; then the error."""

    capacity: int
    began: list[int] = field(default_factory=list)
    ended: dict[int, StepDone] = field(default_factory=dict)
    copies: list[int] = field(default_factory=list)
    failed_copies: list[int] = field(default_factory=list)
    is_woken: bool = False
    error: str | None = None

    def owed(self) -> ExecutorOutput | None:
        """Return what a wait hands out now."""
        steps = []
        for step_id in self.began:
            if step_id not in self.ended:
                break
            steps.append(self.ended[step_id])
        if not (steps or self.copies or self.failed_copies):
            return None
        return ExecutorOutput(tuple(steps), tuple(self.copies), tuple(self.failed_copies))


class Machine(RuleBasedStateMachine):
    """Steps begin, end in any order, are handed out; so do copies; the device fails; a wake."""

    @initialize(num_slots=st.integers(1, 4), lookahead=st.integers(0, 1))
    def open(self, num_slots: int, lookahead: int) -> None:
        """Begin with nothing in flight."""
        self.in_flight = InFlight(num_slots, lookahead)
        self.model = Model(num_slots + lookahead)
        self.next_step = 0
        self.next_copy = 0

    @rule()
    def begin(self) -> None:
        """Begin a step where a slot is free; where none is, it is refused."""
        step_id, self.next_step = self.next_step, self.next_step + 1
        if len(self.model.began) == self.model.capacity:
            with pytest.raises(RuntimeError, match="without a free slot"):
                self.in_flight.begin(plan(step_id))
            return
        self.in_flight.begin(plan(step_id))
        self.model.began.append(step_id)

    @rule()
    def begin_without_work(self) -> None:
        """A plan without work takes no slot, however full it is, and nothing comes of its end."""
        step_id, self.next_step = self.next_step, self.next_step + 1
        self.in_flight.begin(plan(step_id, has_work=False))
        self.in_flight.finish(done(step_id))

    @precondition(lambda self: bool(set(self.model.began) - set(self.model.ended)))
    @rule(data=st.data(), has_failed=st.booleans())
    def end(self, data: st.DataObject, has_failed: bool) -> None:
        """One of the steps under way ends, well or not."""
        running = [step for step in self.model.began if step not in self.model.ended]
        ended = done(data.draw(st.sampled_from(running)), "KeyError: 9" if has_failed else None)
        self.in_flight.finish(ended)
        self.model.ended[ended.step_id] = ended

    @rule(is_done=st.booleans())
    def end_copy(self, is_done: bool) -> None:
        """A copy is over, well or not: it takes no slot, and ends no step."""
        copy_id, self.next_copy = self.next_copy, self.next_copy + 1
        self.in_flight.finish_copy(copy_id, is_done)
        (self.model.copies if is_done else self.model.failed_copies).append(copy_id)

    @rule(reason=st.text(max_size=3))
    def fail(self, reason: str) -> None:
        """The device fails, once or more."""
        self.in_flight.fail(reason, OSError(reason))
        if self.model.error is None:
            self.model.error = reason

    @rule()
    def wake(self) -> None:
        """There is news for the engine."""
        self.in_flight.wake()
        self.model.is_woken = True

    @rule()
    def wait(self) -> None:
        """What has ended comes out in order, then the failure, now and ever after."""
        owed, self.model.is_woken = self.model.owed(), False
        if owed is None and self.model.error is not None:
            with pytest.raises(RuntimeError) as caught:
                self.in_flight.wait(math.inf)
            assert str(caught.value) == self.model.error
            assert isinstance(caught.value.__cause__, OSError)
            return
        assert self.in_flight.wait(-math.inf) == owed
        if owed is not None:
            del self.model.began[: len(owed.steps)]
            self.model.copies, self.model.failed_copies = [], []

    @precondition(lambda self: self.model.is_woken and not self.model.owed())
    @rule()
    def wait_when_woken(self) -> None:
        """A wake is not lost on a wait that begins after it."""
        if self.model.error is None:
            assert self.in_flight.wait(math.inf) is None
            self.model.is_woken = False

    @invariant()
    def slots_are_those_not_handed_out(self) -> None:
        """A step gives its slot back when it is handed out, not when it ends."""
        assert self.in_flight.can_begin() == (len(self.model.began) < self.model.capacity)
        assert self.in_flight.has_failed == (self.model.error is not None)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def waiting(in_flight: InFlight, until: float = math.inf) -> tuple[threading.Thread, list[object]]:
    """Start to wait on another thread; returns it with what its wait comes to."""
    results: list[object] = []

    def wait() -> None:
        try:
            results.append(in_flight.wait(until))
        except RuntimeError as error:
            results.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, results


@pytest.mark.parametrize(
    ("tell", "result"),
    [
        (lambda in_flight: in_flight.finish(done(0)), ((done(0),), (), ())),
        (lambda in_flight: in_flight.finish_copy(4, True), ((), (4,), ())),
        (lambda in_flight: in_flight.finish_copy(4, False), ((), (), (4,))),
        (lambda in_flight: in_flight.wake(), None),
        (lambda in_flight: in_flight.fail("it is gone"), "it is gone"),
    ],
    ids=["finish", "copy", "failed copy", "wake", "fail"],
)
def test_whatever_happens_ends_a_wait(tell: Callable[[InFlight], None], result: object) -> None:
    """A wait without end returns at the end of a step or copy, when woken, and at a failure."""
    in_flight = InFlight(1, 0)
    in_flight.begin(plan(0))
    thread, results = waiting(in_flight)
    tell(in_flight)
    thread.join(30)
    assert results == [result]


def test_a_step_that_ends_before_an_earlier_one_does_not_end_a_wait() -> None:
    """It is handed out with the earlier one."""
    in_flight = InFlight(2, 0)
    in_flight.begin(plan(0))
    in_flight.begin(plan(1))
    thread, results = waiting(in_flight)
    in_flight.finish(done(1))
    assert not results
    in_flight.finish(done(0))
    thread.join(30)
    assert results == [((done(0), done(1)), (), ())]


def test_a_wait_ends_at_its_time() -> None:
    """Not before, and a time gone by is no wait at all."""
    in_flight = InFlight(1, 0)
    until = time.monotonic() + 0.02
    assert in_flight.wait(until) is None
    assert time.monotonic() >= until
    assert in_flight.wait(-math.inf) is None
