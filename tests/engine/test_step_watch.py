"""What is due of an engine, by the facts and plans that it has seen, told when."""

from __future__ import annotations

import dataclasses

import pytest

from fastserve.core.cost_model import CostModel
from fastserve.core.messages import (
    NO_STEP,
    Aborted,
    Copy,
    CopyDirection,
    ExecutorOutput,
    SchedulerOutput,
    StepDone,
    Work,
)
from fastserve.core.request import Handle
from fastserve.engine.step_watch import PATIENCE, Hang, StepWatch

COSTS = CostModel(base_s=1.0, prefill_token_s=0.1, copy_base_s=0.5, copy_block_s=0.25)
TIMEOUT_S = 20.0


def make_watch(first_s: float = 0.0) -> StepWatch:
    """Return a watch of an engine that begins at 0."""
    return StepWatch(COSTS, TIMEOUT_S, 0.0, first_s=first_s)


def step(step_id: int, num_tokens: int = 1, handle: int = 7) -> SchedulerOutput:
    """Return a plan of one share."""
    fields = dict.fromkeys(Work._fields)
    work = Work(**{**fields, "handle": Handle(handle), "start": 0, "num_tokens": num_tokens})  # type: ignore[arg-type]
    return SchedulerOutput(step_id, (), (work,))


def copies(*sizes: int, first_id: int = 0) -> SchedulerOutput:
    """Return a plan that only copies so many blocks each."""
    made = [
        Copy(first_id + index, CopyDirection.SWAP_OUT, tuple(range(size)), tuple(range(size)))
        for index, size in enumerate(sizes)
    ]
    return SchedulerOutput(NO_STEP, (), (), tuple(made))


def wait(watch: StepWatch, now: float, *plans: SchedulerOutput) -> None:
    """Submit plans and wait, as `Engine.step` does."""
    for plan in plans:
        watch.planned(plan, True, now)
    watch.planned(None, False, now)


def ended(*step_ids: int, copies: tuple[int, ...] = ()) -> ExecutorOutput:
    """Return what the executor says of steps and copies that have ended."""
    return ExecutorOutput(tuple(StepDone(step_id, (), 1.0) for step_id in step_ids), copies)


def due_at(watch: StepWatch, since: float) -> float:
    """Return when something is overdue first, in tenths of seconds."""
    return next(since + tenth / 10 for tenth in range(10_000) if watch.overdue(since + tenth / 10))


def test_an_idle_engine_waits_for_ever() -> None:
    """Nothing is due of it; nor after it was woken and told something that left nothing to do."""
    watch = make_watch()
    wait(watch, 1.0)
    assert watch.overdue(1e9) is None
    watch.told(Aborted(Handle(1)), 1e9)
    wait(watch, 1e9)
    assert watch.overdue(2e9) is None


def test_a_step_is_due_by_what_is_expected_of_it() -> None:
    """Beyond the timeout: so many times its own price; those whose step it was are named."""
    for num_tokens in (1, 100, 1000):
        watch = make_watch()
        wait(watch, 5.0, step(3, num_tokens))
        expected_s = COSTS.iteration_s(num_tokens, 0)
        limit_s = TIMEOUT_S + PATIENCE * expected_s
        assert watch.overdue(5.0 + limit_s - 0.01) is None
        hang = watch.overdue(5.0 + limit_s + 0.1)
        assert hang == Hang(
            f"step 3 has not ended for {limit_s + 0.1:.1f} s; {expected_s:.2g} s were expected "
            "of it",
            (Handle(7),),
        )


def test_each_end_gives_the_next_step_its_whole_time() -> None:
    """Of several in flight it is the oldest that is due; what is submitted meanwhile is no end."""
    watch = make_watch()
    wait(watch, 0.0, step(0, handle=1), step(1, handle=2))
    one_s = PATIENCE * COSTS.iteration_s(1, 0) + TIMEOUT_S
    assert due_at(watch, 0.0) == pytest.approx(one_s, abs=0.11)
    watch.updated(ended(0), (), 15.0)
    wait(watch, 15.0, step(2))
    assert due_at(watch, 15.0) == pytest.approx(15.0 + one_s, abs=0.11)
    hang = watch.overdue(60.0)
    assert hang is not None
    assert hang.handles == (Handle(2),)
    wait(watch, 30.0, copies(1))
    watch.updated(ended(copies=(0,)), (), 31.0)
    wait(watch, 31.0)
    assert due_at(watch, 15.0) == pytest.approx(15.0 + one_s, abs=0.11), "a copy ended, no step"
    watch.updated(ended(1, 2), (), 32.0)
    wait(watch, 32.0)
    assert watch.overdue(1e9) is None


def test_a_first_step_may_have_to_compile() -> None:
    """Where it is told so, and only until one has ended."""
    watch = make_watch(first_s=60.0)
    one_s = PATIENCE * COSTS.iteration_s(1, 0) + TIMEOUT_S
    wait(watch, 0.0, step(0))
    assert due_at(watch, 0.0) == pytest.approx(60.0 + one_s, abs=0.11)
    watch.updated(ended(0), (), 70.0)
    wait(watch, 70.0, step(1))
    assert due_at(watch, 70.0) == pytest.approx(70.0 + one_s, abs=0.11)


def test_copies_are_due_by_the_blocks_they_move() -> None:
    """All together, counted anew whenever one has ended, in whatever order; failed ones too."""
    watch = make_watch()
    wait(watch, 0.0, copies(10, 20))
    assert due_at(watch, 0.0) == pytest.approx(TIMEOUT_S + PATIENCE * (1.5 + 7.5), abs=0.11)
    assert "none of 2 copies" in str(watch.overdue(1e3))
    watch.updated(ended(copies=(1,)), (), 10.0)
    wait(watch, 10.0)
    assert due_at(watch, 10.0) == pytest.approx(10 + TIMEOUT_S + PATIENCE * (1 + 2.5), abs=0.11)
    watch.updated(ExecutorOutput((), (), (0,)), (), 11.0)
    wait(watch, 11.0)
    assert watch.overdue(1e9) is None


def test_a_loop_that_does_not_come_back_is_due() -> None:
    """Wherever it is at: its start, a fact, a plan, news, or when it was woken for nothing."""
    watch = make_watch()
    assert due_at(watch, 0.0) == pytest.approx(TIMEOUT_S, abs=0.11)
    for now, act in (
        (100.0, lambda: watch.told(Aborted(Handle(1)), 100.0)),
        (200.0, lambda: watch.planned(step(0), True, 200.0)),
        (300.0, lambda: watch.updated(ended(0), (), 300.0)),
        (400.0, lambda: watch.turned(400.0)),
    ):
        act()
        hang = watch.overdue(now + TIMEOUT_S + 1.0)
        assert hang == Hang("the engine's loop has not come back for 21.0 s")
        watch.planned(None, True, now + TIMEOUT_S + 1.0)
        assert watch.overdue(now + TIMEOUT_S + 1.0) is None


def test_costs_are_those_of_the_machine() -> None:
    """A slow one has more time for the same step."""
    slow = dataclasses.replace(COSTS, base_s=50.0)
    watch = StepWatch(slow, TIMEOUT_S, 0.0)
    wait(watch, 0.0, step(0))
    assert watch.overdue(500.0) is None
    assert watch.overdue(530.0) is not None
