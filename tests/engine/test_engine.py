"""The loop: it submits, waits and reports, in virtual time, and nobody who watches can stop it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import cast

import pytest

from fastserve.core.build import build_scheduler
from fastserve.core.cost_model import CostModel
from fastserve.core.journal import Journal
from fastserve.core.messages import (
    NO_STEP,
    Copy,
    CopyDirection,
    ExecutorOutput,
    Fact,
    RequestUpdate,
    SchedulerOutput,
)
from fastserve.core.policies.fcfs import FCFS
from fastserve.core.policies.protocol import Policy
from fastserve.core.request import Arrival, FinishReason, Request, SamplingParams
from fastserve.core.scheduler import Scheduler
from fastserve.engine.engine import Engine, MonotonicClock
from fastserve.engine.interfaces import Observer
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.clock import VirtualClock
from tests.fake_executor import FakeExecutor, default_token

COSTS = CostModel(base_s=0.9, prefill_token_s=0.01, decode_seq_s=0.1)


def make_engine(
    *,
    num_slots: int = 1,
    lookahead: int = 0,
    observers: Sequence[Observer] = (),
    is_strict: bool = True,
    policy: Policy | None = None,
) -> Engine:
    """Return an engine before a checked fake device with 64 blocks of 4 tokens."""
    clock = VirtualClock()
    executor = FakeExecutor(clock, 4, num_slots=num_slots, lookahead=lookahead)
    config = SchedulerConfig(
        max_num_seqs=4, max_num_batched_tokens=16, max_model_len=128, block_size=4,
        num_slots=num_slots, lookahead=lookahead, is_strict=is_strict,
    )  # fmt: skip
    scheduler = build_scheduler(config, COSTS, 64, policy=policy)
    return Engine(scheduler, executor, clock, observers)


def run_all(engine: Engine) -> list[RequestUpdate]:
    """Step until nothing is left, checking the scheduler after each."""
    updates: list[RequestUpdate] = []
    while not engine.is_idle:
        updates += engine.step()
        engine.scheduler.check()
    return updates


def ids_of(updates: Sequence[RequestUpdate], handle: int) -> list[int]:
    """Return the ids that one request was given."""
    return [sample.token_id for u in updates if u.handle == handle for sample in u.samples]


@pytest.mark.parametrize(("num_slots", "lookahead"), [(1, 0), (1, 1), (2, 0), (4, 0)])
def test_every_request_gets_its_ids_and_one_end(num_slots: int, lookahead: int) -> None:
    """However many steps are in flight, ids are the request's own and it ends once."""
    engine = make_engine(num_slots=num_slots, lookahead=lookahead)
    handles = [
        engine.add(Arrival(range(5 + seed), SamplingParams(seed=seed, max_tokens=10 + seed)))
        for seed in range(6)
    ]
    updates = run_all(engine)
    for seed, handle in enumerate(handles):
        assert ids_of(updates, handle) == [default_token(seed, i) for i in range(10 + seed)]
        ends = [u.finish_reason for u in updates if u.handle == handle and u.finish_reason]
        assert ends == [FinishReason.LENGTH]


def test_the_sizes_of_steps_are_counted() -> None:
    """Every step once, with all its tokens: a prompt in two pieces, then a token a step."""
    engine = make_engine()
    engine.add(Arrival(range(20), SamplingParams(seed=1, max_tokens=5)))
    run_all(engine)
    stats = engine.stats()
    assert stats.step_tokens == 20 + 4
    assert list(stats.steps_by_tokens[:3]) == [4, 1, 1]  # up to 1, 8 and 16 tokens
    assert sum(stats.steps_by_tokens) == stats.scheduler.num_steps


def test_a_step_waits_no_longer_than_asked() -> None:
    """`until` bounds the wait; the step in flight is reported by a later call."""
    engine = make_engine()
    engine.add(Arrival([1, 2], SamplingParams(seed=1, max_tokens=1)))
    assert engine.step(until=0.25) == []
    assert engine.clock.now() == 0.25
    assert not engine.is_idle
    (update,) = engine.step()
    assert update.finish_reason is FinishReason.LENGTH
    assert engine.clock.now() == 1.0


def test_abort_holds_memory_until_the_step_is_done() -> None:
    """An aborted request is gone at once, the engine is idle when its step is."""
    engine = make_engine()
    handle = engine.add(Arrival([1, 2], SamplingParams(seed=1, max_tokens=9)))
    engine.step(until=0.5)
    update = engine.abort(handle)
    assert update is not None
    assert update.finish_reason is FinishReason.ABORT
    assert engine.abort(handle) is None
    assert engine.num_requests == 0
    assert not engine.is_idle
    assert engine.step() == []
    assert engine.is_idle
    assert engine.stats().scheduler.device_blocks_used == 0


def test_finish_ends_with_stop() -> None:
    """A stop string's end is reported by the call itself, and only once."""
    engine = make_engine()
    handle = engine.add(Arrival([1, 2], SamplingParams(seed=1, max_tokens=9)))
    engine.step()
    update = engine.finish(handle, 1)
    assert update is not None
    assert update.finish_reason is FinishReason.STOP
    assert engine.finish(handle, 1) is None


@pytest.mark.parametrize(("num_slots", "lookahead"), [(1, 0), (1, 1), (2, 0)])
def test_a_failed_step_costs_its_own_requests_and_nothing_else(
    num_slots: int, lookahead: int
) -> None:
    """They end with an error, whatever else of them is in flight; others come out whole."""
    engine = make_engine(num_slots=num_slots, lookahead=lookahead)
    assert isinstance(engine.executor, FakeExecutor)
    lost = [
        engine.add(Arrival(range(5), SamplingParams(seed=seed, max_tokens=9))) for seed in range(2)
    ]
    engine.step()
    engine.executor.fails_next = True
    updates = run_all(engine)
    ends = {u.handle: (u.finish_reason, u.error) for u in updates if u.finish_reason}
    failed = [handle for handle in lost if ends[handle][0] is FinishReason.ERROR]
    assert len(failed) == (2 if num_slots == 1 else 1)
    assert all(ends[handle] == (FinishReason.ERROR, "it was told to fail") for handle in failed)
    assert engine.stats().scheduler.device_blocks_used == 0
    later = engine.add(Arrival(range(5), SamplingParams(seed=7, max_tokens=9)))
    assert ids_of(run_all(engine), later) == [default_token(7, i) for i in range(9)]


def test_stats_tell_what_was_done() -> None:
    """Device seconds are the steps' own; the scheduler's counters are in."""
    engine = make_engine()
    engine.add(Arrival([1, 2], SamplingParams(seed=1, max_tokens=5)))
    run_all(engine)
    stats = engine.stats()
    assert stats.device_s == 5.0
    assert stats.scheduler.num_steps == 5
    assert stats.num_requests == 0
    assert stats.at == engine.clock.now()


def watched(engine: Engine) -> list[tuple[float, float]]:
    """Return a list that every wait of the executor adds its `until` and its end to."""
    waits: list[tuple[float, float]] = []
    wait = engine.executor.wait

    def watch(until: float) -> ExecutorOutput | None:
        output = wait(until)
        waits.append((until, engine.clock.now()))
        return output

    engine.executor.wait = watch  # type: ignore[method-assign]
    return waits


def test_an_idle_engine_waits_once_and_as_long_as_asked() -> None:
    """Nothing is due by itself: one wait, to the time given."""
    engine = make_engine()
    waits = watched(engine)
    assert engine.step(until=5.0) == []
    assert waits == [(5.0, 5.0)]


@pytest.mark.parametrize(("num_slots", "lookahead"), [(1, 0), (1, 1), (2, 0), (4, 0)])
def test_a_blocked_engine_wakes_when_a_step_lands(num_slots: int, lookahead: int) -> None:
    """No slot is free, or no request can use one: one wait, to the end of the step."""
    engine = make_engine(num_slots=num_slots, lookahead=lookahead, policy=FCFS())
    engine.add(Arrival(range(5), SamplingParams(seed=1, max_tokens=2)))
    waits = watched(engine)
    for number in range(2):
        engine.step()
        assert waits == [(math.inf, at + 1.0) for at in range(number + 1)]


class LateSecond(FCFS):
    """Lets the second request run from 0.5 on; the last event is always the one that it names."""

    def __init__(self) -> None:
        super().__init__()
        self._is_open = False

    def advance(self, now: float) -> None:
        """Open at 0.5."""
        self._is_open = now >= 0.5

    def next_event(self, now: float) -> float:
        """Return a time that may have come already."""
        return 0.5

    def ordered(self) -> Iterator[Request]:
        """Yield what may run."""
        return islice(super().ordered(), 2 if self._is_open else 1)


@pytest.mark.parametrize(
    ("num_slots", "planned_at", "untils"),
    [(2, [0.0, 0.5], [0.5, math.inf, math.inf]), (1, [0.0, 1.0], [math.inf, math.inf])],
)
def test_a_blocked_engine_wakes_when_time_changes_the_order(
    num_slots: int, planned_at: list[float], untils: list[float]
) -> None:
    """At that very time and once where a slot is free; where none is, time is of no account."""
    engine = make_engine(num_slots=num_slots, policy=LateSecond())
    waits = watched(engine)
    handles = [engine.add(Arrival(range(5), SamplingParams(seed=1, max_tokens=1)))
               for _ in range(2)]  # fmt: skip
    updates = run_all(engine)
    found = {u.handle: u.metrics.first_scheduled for u in updates if u.metrics is not None}
    assert [found[handle] for handle in handles] == planned_at
    assert [until for until, _ in waits] == untils


@pytest.mark.parametrize(("num_slots", "lookahead"), [(1, 0), (1, 1), (2, 0), (4, 0)])
def test_the_device_forgets_what_ended_though_nothing_else_is_planned(
    num_slots: int, lookahead: int
) -> None:
    """Aborted between two steps, under a step, or ended by itself: an idle device knows nothing."""
    engine = make_engine(num_slots=num_slots, lookahead=lookahead)
    assert isinstance(engine.executor, FakeExecutor)
    params = SamplingParams(seed=1, max_tokens=9)
    between = engine.add(Arrival(range(5), params))
    engine.step()
    engine.abort(between)
    run_all(engine)
    assert not engine.executor.states
    under = engine.add(Arrival(range(5), params))
    engine.step(until=engine.clock.now() + 0.5)
    engine.abort(under)
    engine.step(until=engine.clock.now() + 0.1)  # its step is still in flight
    assert not engine.executor.states
    run_all(engine)
    engine.add(Arrival(range(5), params))
    run_all(engine)
    assert not engine.executor.states
    assert engine.executor.forgotten == [0, 1, 2]
    assert all(plan.work for plan in engine.executor.plans)


class Copying:
    """A scheduler that also has blocks copied: plans carry them, what is done comes back."""

    def __init__(self, scheduler: Scheduler, num_copies: int) -> None:
        self._scheduler = scheduler
        self._left = list(range(num_copies))
        self.done: list[tuple[int, float]] = []

    def __getattr__(self, name: str) -> object:
        """Be the scheduler in all else."""
        return getattr(self._scheduler, name)

    def schedule(self, now: float, can_compute: bool) -> SchedulerOutput | None:
        """Begin one copy with every plan, whether it has work or not."""
        plan = self._scheduler.schedule(now, can_compute)
        if not self._left:
            return plan
        copy_id = self._left.pop(0)
        copy = Copy(copy_id, CopyDirection.SWAP_OUT, (60 + copy_id,), (copy_id,))
        return (plan or SchedulerOutput(NO_STEP, (), ()))._replace(copies=(copy,))

    def update(self, output: ExecutorOutput, now: float) -> list[RequestUpdate]:
        """Note the copies, and hand the rest on."""
        self.done += [(copy_id, now) for copy_id in output.copies]
        return self._scheduler.update(output._replace(copies=()), now)


@pytest.mark.parametrize(("num_slots", "lookahead"), [(1, 0), (1, 1), (2, 0), (4, 0)])
def test_copies_need_no_slot_and_are_told_when_they_are_done(
    num_slots: int, lookahead: int
) -> None:
    """They begin though the device is busy, end by themselves, and change no request."""
    engine = make_engine(num_slots=num_slots, lookahead=lookahead)
    assert isinstance(engine.executor, FakeExecutor)
    engine.executor.copy_s = lambda copy: 0.25 * (copy.copy_id + 1)
    copying = Copying(engine.scheduler, num_copies=4)
    engine.scheduler = cast("Scheduler", copying)
    handle = engine.add(Arrival(range(5), SamplingParams(seed=3, max_tokens=3)))
    updates = run_all(engine)
    assert copying.done == [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0)]
    assert ids_of(updates, handle) == [default_token(3, i) for i in range(3)]


def test_a_copy_that_no_plan_began_is_no_secret() -> None:
    """A fact that the scheduler cannot place is an error."""
    engine = make_engine()
    with pytest.raises(ValueError, match="copy 7 is done"):
        engine.scheduler.update(ExecutorOutput(copies=(7,)), 0.0)


class Recorder:
    """Remembers what it sees."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, object]] = []

    def told(self, fact: Fact, now: float) -> None:
        """See a fact."""
        self.seen.append(("told", now, type(fact).__name__))

    def planned(self, plan: SchedulerOutput | None, can_compute: bool, now: float) -> None:
        """See a plan."""
        self.seen.append(("planned", now, None if plan is None else plan.step_id))

    def updated(self, output: ExecutorOutput, updates: Sequence[RequestUpdate], now: float) -> None:
        """See an update."""
        self.seen.append(("updated", now, [step.step_id for step in output.steps]))


class Faulty(Recorder):
    """Fails at everything."""

    def planned(self, plan: SchedulerOutput | None, can_compute: bool, now: float) -> None:
        """Fail."""
        raise KeyError("a bug in an observer")


def test_observers_see_every_fact_plan_and_result() -> None:
    """Facts before the scheduler is told, plans before their results; the last only forgets."""
    recorder = Recorder()
    engine = make_engine(observers=[recorder])
    handle = engine.add(Arrival([1, 2], SamplingParams(seed=1, max_tokens=2)))
    run_all(engine)
    engine.abort(handle)
    engine.finish(handle, 1)
    with pytest.raises(ValueError, match="empty"):
        engine.add(Arrival([], SamplingParams()))
    assert recorder.seen == [
        ("told", 0.0, "Arrival"),
        ("planned", 0.0, 0), ("planned", 0.0, None),
        ("told", 1.0, "ExecutorOutput"), ("updated", 1.0, [0]),
        ("planned", 1.0, 1), ("planned", 1.0, None),
        ("told", 2.0, "ExecutorOutput"), ("updated", 2.0, [1]),
        ("planned", 2.0, NO_STEP), ("planned", 2.0, None),
        ("told", 2.0, "Aborted"), ("planned", 2.0, None),
        ("told", 2.0, "Finished"), ("planned", 2.0, None),
        ("told", 2.0, "Arrival"),
    ]  # fmt: skip


def test_an_observer_that_fails_is_logged_and_stops_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is logged once, with its trace, and dropped; requests and other observers go on."""
    recorder = Recorder()
    engine = make_engine(observers=[Faulty(), recorder], is_strict=False)
    handle = engine.add(Arrival([1, 2], SamplingParams(seed=1, max_tokens=3)))
    with caplog.at_level(logging.ERROR):
        updates = run_all(engine)
    assert len(ids_of(updates, handle)) == 3
    assert len(recorder.seen) == 1 + 3 * 4 + 2
    failures = [record for record in caplog.records if record.exc_info]
    assert len(failures) == 1
    assert "Faulty" in failures[0].getMessage()
    assert engine.observers == (recorder,)


def test_a_journal_that_cannot_be_written_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A full disk costs the journal, not the requests."""

    def write(line: str) -> None:
        if len(lines) == 4:
            raise OSError(28, "No space left on device")
        lines.append(line)

    lines: list[str] = []
    engine = make_engine(observers=[Journal(write)], is_strict=False)
    handle = engine.add(Arrival([1, 2], SamplingParams(seed=1, max_tokens=3)))
    assert len(ids_of(run_all(engine), handle)) == 3
    assert len(lines) == 4
    (record,) = caplog.records
    assert record.getMessage() == (
        "the engine goes on without its Journal: [Errno 28] No space left on device"
    )
    assert not record.exc_info


def test_a_strict_engine_has_no_patience_with_observers() -> None:
    """In the simulator what an observer raises is the run's failure."""
    engine = make_engine(observers=[Faulty()])
    engine.add(Arrival([1, 2], SamplingParams(seed=1, max_tokens=3)))
    with pytest.raises(KeyError, match="a bug"):
        engine.step()


def test_close_lets_go_once_of_what_was_opened() -> None:
    """The caller's own closing is used when given."""
    closed: list[str] = []
    engine = make_engine()
    with_own = Engine(
        engine.scheduler, engine.executor, engine.clock, on_close=lambda: closed.append("own")
    )
    with_own.close()
    engine.close()
    assert closed == ["own"]


def test_the_clock_never_goes_back() -> None:
    """The live clock is the machine's monotonic one."""
    clock = MonotonicClock()
    assert clock.now() <= clock.now()
