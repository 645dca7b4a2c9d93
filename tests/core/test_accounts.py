"""Accounts: held against what an observer of the door adds up by itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fastserve.core.accounts import Counters
from fastserve.core.messages import (
    WORK_BOUNDS_S,
    ExecutorOutput,
    Fact,
    RequestUpdate,
    SchedulerOutput,
)
from fastserve.core.request import Arrival
from tests.core.harness import Harness, small_config

PIPELINES = ((1, 0), (1, 1), (2, 0), (4, 0))


class Naive:
    """Adds up, from plans and results alone, how long each request waited and what it computed."""

    def __init__(self) -> None:
        self.now_flying: dict[int, int] = {}
        self.waits_since: dict[int, float] = {}
        self.queue_s: dict[int, float] = {}
        self.started: set[int] = set()
        self.ended: dict[int, tuple[float, float]] = {}
        self.plans: dict[int, SchedulerOutput] = {}

    def told(self, fact: Fact, now: float) -> None:
        """A request arrives with the next handle."""
        if isinstance(fact, Arrival):
            handle = len(self.queue_s)
            self.queue_s[handle] = 0.0
            self.waits_since[handle] = now
            self.now_flying[handle] = 0

    def planned(self, plan: SchedulerOutput | None, can_compute: bool, now: float) -> None:
        """Those in a plan wait no longer."""
        if plan is None or not plan.work:
            return
        self.plans[plan.step_id] = plan
        self.started.update(work.handle for work in plan.work)
        for work in plan.work:
            if not self.now_flying[work.handle]:
                self.queue_s[work.handle] += now - self.waits_since[work.handle]
            self.now_flying[work.handle] += 1

    def updated(self, output: ExecutorOutput, updates: Sequence[RequestUpdate], now: float) -> None:
        """Those whose last step has landed wait again; those that end do not."""
        for done in output.steps:
            for work in self.plans.pop(done.step_id).work:
                self.now_flying[work.handle] -= 1
                self.waits_since[work.handle] = now
        for update in updates:
            if update.metrics is not None:
                self.ended[update.handle] = (self.queue_s[update.handle], update.metrics.queue_s)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_time_in_queues_is_what_an_observer_adds_up(pipeline: tuple[int, int]) -> None:
    """Through preemption, recomputation and several steps in flight, request by request."""
    num_preemptions = 0
    for seed in range(20):
        config = small_config(
            max_num_seqs=2, max_num_batched_tokens=7, max_model_len=24, starvation_limit=1.0,
            scheduling_policy="skip-join-mlfq", num_slots=pipeline[0], lookahead=pipeline[1],
        )  # fmt: skip
        harness = Harness(config, 8, seed=seed)
        naive = Naive()
        harness.engine.observers = (*harness.engine.observers, naive)
        for number in range(6):
            harness.add(range(1 + 3 * number), 5)
            harness.step()
            stats, num_live = harness.scheduler.stats(), harness.scheduler.num_requests
            num_started = len(naive.started - set(naive.ended))
            assert stats.num_waiting == num_live - num_started
            assert stats.num_running + stats.num_preempted == num_started
        harness.drain()
        assert len(naive.ended) == 6
        for ours, theirs in naive.ended.values():
            assert theirs == pytest.approx(ours, abs=1e-9)
        num_preemptions += harness.scheduler.stats().num_preemptions
    assert num_preemptions > 0


def test_every_counter_is_in_the_statistics() -> None:
    """Nothing is counted that nobody can read."""
    stats = Harness(small_config(), 8).scheduler.stats()
    for name in Counters.__slots__:
        assert getattr(stats, name) == 0


def test_an_end_brings_what_was_predicted() -> None:
    """The sums over ends are those of the statistics; every live request is in one bucket."""
    config = small_config(scheduling_policy="learned", max_num_seqs=2)
    harness = Harness(config, 64)
    for number in range(12):
        harness.add(range(1 + number % 3), 2 + 5 * (number % 4), priority=number % 2)
        harness.step()
        stats = harness.scheduler.stats()
        assert len(stats.requests_by_work) == len(WORK_BOUNDS_S) + 1
        assert sum(stats.requests_by_work) == harness.scheduler.num_requests
    harness.drain()
    forecasts = harness.scheduler.stats().forecasts
    assert forecasts is not None
    ends = [expected.last for expected in harness.expected.values()]
    predicted = [end.metrics.predicted_output_tokens for end in ends if end and end.metrics]
    assert forecasts.predicted_tokens == pytest.approx(sum(filter(None, predicted)))
    answered = sum(len(expected.received) for expected in harness.expected.values())
    assert (sum(forecasts.num_by_decile), forecasts.answered_tokens) == (12, answered)
    assert forecasts.work_s == pytest.approx(0.0, abs=1e-9)


def test_nothing_is_made_up_where_nothing_is_predicted() -> None:
    """No number stands for a prediction that was not made."""
    harness = Harness(small_config(), 8)
    handle = harness.add(range(3), 2)
    harness.drain()
    last = harness.expected[handle].last
    assert last is not None
    assert last.metrics is not None
    assert last.metrics.predicted_output_tokens is None
    stats = harness.scheduler.stats()
    assert stats.forecasts is None
    assert not stats.requests_by_work
