"""Steps and copies are over when all ranks have said so, whatever order they say it in."""

from __future__ import annotations

import itertools
import random

import pytest

from fastserve.core.messages import ExecutorOutput, Sample, SchedulerOutput, StepDone
from fastserve.executor.in_flight import InFlight
from fastserve.executor.layout import Layout
from fastserve.executor.tally import Tally
from tests.core.builders import make_work

NOW = -float("inf")


def tally_of(layout: Layout, num_steps: int = 1) -> tuple[Tally, InFlight]:
    """Return a tally with so many steps in flight."""
    in_flight = InFlight(layout.pipeline_parallel_size, 0)
    for step_id in range(num_steps):
        in_flight.begin(SchedulerOutput(step_id, (), (make_work(handle=step_id),)))
    return Tally(layout, in_flight), in_flight


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_a_step_takes_every_stage(order: tuple[int, ...]) -> None:
    """What the last stage drew comes with the mean of the stages' seconds, no sooner."""
    layout = Layout(2, 3)
    tally, in_flight = tally_of(layout)
    for stage in order:
        assert in_flight.wait(NOW) is None
        samples = (Sample(7),) if stage == 2 else ()
        tally.step_ended(layout.rank_at(stage, 0), StepDone(0, samples, 3.0 * (stage + 1)))
    assert in_flight.wait(NOW) == ExecutorOutput((StepDone(0, (Sample(7),), 6.0),))


def test_steps_in_flight_are_kept_apart() -> None:
    """The first stage is through with the second step before the last is with the first."""
    tally, in_flight = tally_of(Layout(1, 2), num_steps=2)
    tally.step_ended(0, StepDone(0, (), 1.0))
    tally.step_ended(0, StepDone(1, (), 2.0))
    tally.step_ended(1, StepDone(0, (Sample(5),), 3.0))
    assert in_flight.wait(NOW) == ExecutorOutput((StepDone(0, (Sample(5),), 2.0),))
    tally.step_ended(1, StepDone(1, (Sample(6),), 4.0))
    assert in_flight.wait(NOW) == ExecutorOutput((StepDone(1, (Sample(6),), 3.0),))


def test_a_copy_takes_every_rank_and_fails_with_one() -> None:
    """It is told once, when the last rank is through: until then there may be writes."""
    layout = Layout(2, 2)
    tally, in_flight = tally_of(layout)
    ends = [(copy_id, rank) for copy_id in range(8) for rank in range(layout.num_ranks)]
    random.Random(2).shuffle(ends)
    left = dict.fromkeys(range(8), layout.num_ranks)
    for copy_id, rank in ends:
        tally.copy_ended(copy_id, is_done=(copy_id, rank) != (5, 2))
        left[copy_id] -= 1
        output = in_flight.wait(NOW)
        if left[copy_id]:
            assert output is None
        elif copy_id == 5:
            assert output == ExecutorOutput(failed_copies=(5,))
        else:
            assert output == ExecutorOutput(copies=(copy_id,))
