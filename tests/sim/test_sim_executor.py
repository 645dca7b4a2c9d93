"""The simulated device by itself: time, stages, wake-ups."""

from __future__ import annotations

import pytest

from fastserve.core.messages import SchedulerOutput
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


def test_waiting_for_nothing_is_an_error():
    """Virtual time cannot pass without an event."""
    executor = SimExecutor(VirtualClock(), COSTS, {})
    with pytest.raises(RuntimeError, match="for ever"):
        executor.wait(INF)
    executor.close()
