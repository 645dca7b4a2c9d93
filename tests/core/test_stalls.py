"""Stalls: raised in tests and simulations, survived and counted in serving."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from fastserve.core.build import build_scheduler
from fastserve.core.policies.fcfs import FCFS
from fastserve.core.request import Arrival, Request, SamplingParams
from fastserve.core.stalls import StallError, Stalls
from tests.core.harness import UNIT_COST, Harness, small_config


class Silent(FCFS):
    """Names no request at all."""

    def ordered(self) -> Iterator[Request]:
        """Yield nothing."""
        return iter(())


def test_a_policy_that_names_nobody_stalls_a_strict_scheduler() -> None:
    """The message tells of every live request."""
    scheduler = build_scheduler(small_config(), UNIT_COST, 64, policy=Silent())
    for _ in range(2):
        scheduler.add(Arrival(range(5), SamplingParams(max_tokens=2)), 0.0)
    story = "nothing can run and nothing is in flight: request 0: computed 0/5, in flight 0, "
    with pytest.raises(StallError, match=re.escape(story)) as caught:
        scheduler.schedule(0.0, can_compute=True)
    assert "; request 1: computed 0/5" in str(caught.value)


def test_in_serving_the_oldest_runs_alone_until_it_ends() -> None:
    """Then the next one, and each time is counted; one that runs alone and stalls is fatal."""
    config = small_config(is_strict=False)
    harness = Harness(config, 64, policy=Silent(), step_s=lambda plan: 1.0)
    for handle in range(3):
        harness.add([handle], 2)
    while harness.is_busy:
        harness.step()
    assert [[work.handle for work in plan.work] for plan in harness.executor.plans] == [
        [0], [0], [1], [1], [2], [2],
    ]  # fmt: skip
    assert harness.scheduler.stats().num_stalls == 3
    assert not harness.live


def repeat_landing(stalls: Stalls, count: int) -> None:
    """Let steps land that compute nothing new."""
    for _ in range(count):
        stalls.landed(has_progress=False)


def test_steps_that_compute_nothing_new_are_a_stall() -> None:
    """After so many in a row that no prompt is long enough for them; one that does starts over."""
    harness = Harness(small_config(is_strict=False), 64)
    harness.add([1], 2)
    stalls = harness.scheduler._stalls
    for _ in range(2):
        repeat_landing(stalls, 1000)
        stalls.landed(has_progress=True)
    assert stalls.alone is None
    repeat_landing(stalls, 1100)
    assert stalls.alone is harness.request(0)
    with pytest.raises(StallError, match="no new token"):
        repeat_landing(stalls, 1100)
