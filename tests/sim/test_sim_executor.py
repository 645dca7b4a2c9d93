"""The simulated device by itself: time, stages, wake-ups."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastserve.core.messages import NO_STEP, Copy, CopyDirection, SchedulerOutput
from fastserve.sim.clock import VirtualClock
from fastserve.sim.sim_executor import EOS_TOKEN_ID, SimExecutor
from tests.core.builders import make_work
from tests.sim.machines import COSTS

INF = float("inf")


def plan(step_id, handle, start, num_tokens, *, sample=True):
    """Return a plan with one share."""
    work = make_work(
        handle=handle,
        start=start,
        num_tokens=num_tokens,
        token_ids=(1,) * num_tokens,
        sample=sample,
    )
    return SchedulerOutput(step_id, (), (work,))


def test_steps_pass_through_the_stages():
    """Two steps overlap by all but one stage; each takes as long as it would alone."""
    seen = []
    clock = VirtualClock()
    executor = SimExecutor(
        clock, COSTS, {0: 99, 1: 99}, num_stages=2, on_step=lambda plan, times: seen.append(times)
    )
    step_s = COSTS.iteration_s(10, 0)
    executor.submit(plan(0, 0, 0, 10))
    assert executor.can_submit()
    executor.submit(plan(1, 1, 0, 10))
    assert not executor.can_submit()
    first, second = executor.wait(INF), executor.wait(INF)
    assert first is not None
    assert second is not None
    assert [first.steps[0].step_id, second.steps[0].step_id] == [0, 1]
    assert clock.now() == pytest.approx(1.5 * step_s)
    assert first.steps[0].device_s == pytest.approx(step_s / 2)
    assert seen[0] == [(0.0, pytest.approx(step_s / 2)), (pytest.approx(step_s / 2), step_s)]
    assert executor.busy_s == pytest.approx(step_s)


def test_eos_is_drawn_at_the_end_and_only_where_samples_are_asked():
    """The token that makes a request as long as it is to be ends it."""
    executor = SimExecutor(VirtualClock(), COSTS, {0: 12})
    drawn = []
    for step_id, (start, count, sample) in enumerate([(0, 6, False), (6, 4, True), (10, 1, True)]):
        executor.submit(plan(step_id, 0, start, count, sample=sample))
        done = executor.wait(INF)
        assert done is not None
        drawn.append([item.token_id == EOS_TOKEN_ID for item in done.steps[0].samples])
    assert drawn == [[], [False], [True]]


def test_waiting_ends_at_the_time_given():
    """Nothing is finished yet: time passes to `until`, never back."""
    clock = VirtualClock()
    executor = SimExecutor(clock, COSTS, {0: 99})
    executor.submit(plan(0, 0, 0, 10))
    assert executor.wait(0.25) is None
    assert clock.now() == 0.25
    assert executor.wait(0.1) is None
    assert clock.now() == 0.25
    executor.wake()
    assert executor.wait(INF) is None
    assert executor.wait(INF) is not None


def test_a_copy_runs_beside_the_steps():
    """It takes no slot and no time of theirs, and is reported when it is done, as they are."""
    clock, seen = VirtualClock(), []
    costs = replace(COSTS, copy_base_s=0.1, copy_block_s=0.05)
    executor = SimExecutor(
        clock, costs, {0: 99}, on_copy=lambda copy, *times: seen.append((copy.copy_id, *times))
    )
    out = Copy(7, CopyDirection.SWAP_OUT, (1, 2), (8, 9))
    executor.submit(plan(0, 0, 0, 10)._replace(copies=(out,)))
    back = Copy(8, CopyDirection.SWAP_IN, tuple(range(20)), tuple(range(20)))
    executor.submit(SchedulerOutput(NO_STEP, (), (), copies=(back,)))
    assert executor.num_steps == 1
    first, second, third = (executor.wait(INF) for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    assert ([*first.steps], [*first.copies]) == ([], [7])
    assert ([done.step_id for done in second.steps], [*second.copies]) == ([0], [])
    assert second.steps[0].device_s == pytest.approx(COSTS.iteration_s(10, 0))
    assert ([*third.steps], [*third.copies]) == ([], [8])
    assert clock.now() == pytest.approx(1.1)
    assert seen == [(7, 0.0, pytest.approx(0.2)), (8, 0.0, pytest.approx(1.1))]


def test_what_is_due_together_is_reported_together():
    """A step and a copy that end at one moment come in one output."""
    step_s = COSTS.iteration_s(10, 0)
    executor = SimExecutor(VirtualClock(), replace(COSTS, copy_base_s=step_s), {0: 99})
    copy = Copy(3, CopyDirection.SWAP_IN, (1,), (2,))
    executor.submit(plan(0, 0, 0, 10)._replace(copies=(copy,)))
    done = executor.wait(INF)
    assert done is not None
    assert (len(done.steps), [*done.copies]) == (1, [3])


def test_waiting_for_nothing_is_an_error():
    """Virtual time cannot pass without an event."""
    executor = SimExecutor(VirtualClock(), COSTS, {})
    with pytest.raises(RuntimeError, match="for ever"):
        executor.wait(INF)
    executor.close()


def test_machines_beside_each_other_report_what_is_done_first():
    """A short step that began later ends before a long one."""
    clock = VirtualClock()
    executor = SimExecutor(clock, COSTS, {0: 999, 1: 99}, num_stages=2, is_parallel=True)
    executor.submit(plan(0, 0, 0, 100))
    executor.submit(plan(1, 1, 0, 10))
    assert not executor.can_submit()
    done = [executor.wait(INF), executor.wait(INF)]
    assert [output.steps[0].step_id for output in done if output is not None] == [1, 0]
    assert clock.now() == pytest.approx(COSTS.iteration_s(100, 0))
    assert executor.busy_s == pytest.approx(COSTS.iteration_s(100, 0) + COSTS.iteration_s(10, 0))
    assert executor.next_end == INF
