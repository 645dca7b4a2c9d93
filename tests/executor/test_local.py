"""LocalExecutor: the thread, its waiting and waking, its failures, and lookahead."""

from __future__ import annotations

import math
import random
import threading
import time

import pytest
import torch

from fastserve.core.messages import (
    NO_STEP,
    Copy,
    CopyDirection,
    ExecutorOutput,
    NewRequest,
    SchedulerOutput,
    StepDone,
)
from fastserve.core.request import Handle, SamplingParams
from fastserve.engine.interfaces import Executor
from fastserve.executor.local import LocalExecutor
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from tests.checkpoints import EOS_TOKEN_ID, make_checkpoint
from tests.core.builders import make_work
from tests.executor.driver import GREEDY, Driven, Driver

PROMPT = [random.Random(i).randrange(2, 190) for i in range(11)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama."""
    path = tmp_path_factory.mktemp("llama")
    make_checkpoint(path, "llama")
    return path


@pytest.fixture
def open_executor(checkpoint):
    """Opens executors, and closes them after the test."""
    opened: list[LocalExecutor] = []

    def open_one(swap_bandwidth=None, **settings) -> LocalExecutor:
        config = EngineConfig(
            model=str(checkpoint),
            device="cpu",
            block_size=8,
            num_device_blocks=64,
            preemption_mode="reactive",
            swap_space=0.001,
            swap_bandwidth=swap_bandwidth,
        )
        executor = LocalExecutor(
            config,
            checkpoint,
            eos_token_ids=frozenset({EOS_TOKEN_ID}),
            on_progress=lambda stage, fraction: None,
            is_poisoned=True,
            **{"num_threads": 1, **settings},
        )
        opened.append(executor)
        return executor

    yield open_one
    for executor in opened:
        executor.close()


def first_plan(step_id=0, handle=0, params=GREEDY) -> SchedulerOutput:
    """Return the prefill of PROMPT."""
    work = make_work(
        handle=handle, num_tokens=len(PROMPT), token_ids=tuple(PROMPT), block_ids=(3, 1)
    )
    new = NewRequest(handle, 0, len(PROMPT), params, ())
    return SchedulerOutput(step_id, (new,), (work,))


def test_fits_the_interface_and_generates(open_executor):
    """It is an Executor by shape, and its tokens do not depend on the thread."""
    executor = open_executor()
    as_interface: Executor = executor

    def step(plan: SchedulerOutput) -> StepDone:
        assert as_interface.can_submit()
        as_interface.submit(plan)
        assert not as_interface.can_submit()
        output = as_interface.wait(math.inf)
        assert output is not None
        (done,) = output.steps
        assert done.device_s > 0.0
        return done

    request = Driven(PROMPT, num_tokens=10)
    Driver(step, 64, 8).run(request)
    assert len(request.output) == 10
    assert (executor.num_slots, executor.lookahead) == (1, 0)
    assert executor.setup.facts.num_device_blocks == 64


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.3)]
)
def test_lookahead_yields_the_same_tokens(open_executor, params):
    """Steps submitted behind an unfinished sample give the tokens of lookahead 0."""
    plain = open_executor()
    request = Driven(PROMPT, params, num_tokens=12)

    def step(plan: SchedulerOutput) -> StepDone:
        plain.submit(plan)
        output = plain.wait(math.inf)
        assert output is not None
        return output.steps[0]

    Driver(step, 64, 8).run(request)

    ahead = open_executor(lookahead=1)
    assert ahead.lookahead == 1
    tokens: list[int] = []
    pending = [first_plan(params=params)]
    for position in range(len(PROMPT), len(PROMPT) + 11):
        blocks = (20 + position,) if position % 8 == 0 else ()
        work = make_work(start=position, table_from=position // 8, block_ids=blocks)
        pending.append(SchedulerOutput(position, (), (work,)))
    while len(tokens) < 12:
        while pending and ahead.can_submit():
            ahead.submit(pending.pop(0))
        output = ahead.wait(math.inf)
        assert output is not None
        tokens += [sample.token_id for done in output.steps for sample in done.samples]
    assert tokens == request.output


def test_two_steps_in_flight_with_lookahead(open_executor):
    """With lookahead 1 a second step may be submitted before the first was reported, no third."""
    executor = open_executor(lookahead=1)
    executor.submit(first_plan(0, 0))
    assert executor.can_submit()
    executor.submit(first_plan(1, 1))
    assert not executor.can_submit()
    steps: list[StepDone] = []
    while len(steps) < 2:
        output = executor.wait(math.inf)
        assert output is not None
        steps += output.steps
    assert [done.step_id for done in steps] == [0, 1]
    assert executor.can_submit()


# Of a request that no plan introduced.
IMPOSSIBLE = make_work(handle=9, token_ids=(5,), block_ids=(0,))


def next_step(executor: LocalExecutor) -> StepDone:
    """Wait for exactly one step."""
    output = executor.wait(math.inf)
    assert output is not None
    (done,) = output.steps
    return done


def test_a_step_that_fails_is_reported_and_the_next_one_runs(open_executor):
    """Its error is one line, it has no samples, and others get the tokens they would get alone."""
    alone, executor = open_executor(), open_executor()
    alone.submit(first_plan())
    executor.submit(SchedulerOutput(0, (), (IMPOSSIBLE,)))
    failed = next_step(executor)
    assert (failed.step_id, failed.samples, failed.error) == (0, (), "KeyError: 9")
    executor.submit(first_plan(1))
    done = next_step(executor)
    assert done.error is None
    assert done.samples == next_step(alone).samples


def test_what_is_in_flight_behind_a_failed_step_is_left_out(open_executor):
    """A lookahead step asks for a lost request: that one gets nothing, its company its own ids."""
    executor = open_executor(lookahead=1)
    executor.submit(first_plan(0, 0))
    assert next_step(executor).error is None
    decode = make_work(start=len(PROMPT), table_from=1)
    executor.submit(SchedulerOutput(1, (), (decode, IMPOSSIBLE)))
    new = NewRequest(Handle(1), 0, len(PROMPT), GREEDY, ())
    prefill = make_work(handle=1, num_tokens=len(PROMPT), token_ids=tuple(PROMPT), block_ids=(6, 5))
    again = make_work(start=len(PROMPT) + 1, table_from=1)
    executor.submit(SchedulerOutput(2, (new,), (again, prefill)))
    steps: list[StepDone] = []
    while len(steps) < 2:
        output = executor.wait(math.inf)
        assert output is not None
        steps += output.steps
    assert steps[0].error == "KeyError: 9"
    assert steps[1].error is None
    alone = open_executor()
    alone.submit(first_plan())
    assert steps[1].samples[1] == next_step(alone).samples[0]
    executor.submit(SchedulerOutput(3, (), (IMPOSSIBLE,), forget=(Handle(0), Handle(1), Handle(9))))
    assert next_step(executor).error == "KeyError: 9"
    assert len(executor._worker.table) == 0


def test_a_device_that_is_gone_surfaces_in_wait(open_executor, monkeypatch):
    """Then the failure is raised by wait, after what finished before it, now and ever after."""
    executor = open_executor(lookahead=1)

    def raise_again() -> None:
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(executor._worker, "check_device", raise_again)
    executor.submit(first_plan())
    executor.submit(SchedulerOutput(1, (), (IMPOSSIBLE,)))
    assert next_step(executor).step_id == 0
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"a step failed: .*launch failure") as caught:
            executor.wait(math.inf)
        assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_plan_without_work_takes_no_slot_and_yields_no_step(open_executor):
    """It is carried out behind a step in flight, and the next wait is for the next step."""
    executor = open_executor()
    executor.submit(first_plan(0, 0))
    assert not executor.can_submit()
    executor.submit(SchedulerOutput(1, (), (), forget=(Handle(0),)))
    assert next_step(executor).step_id == 0
    executor.submit(SchedulerOutput(2, (), (), forget=(Handle(5),)))
    executor.submit(first_plan(3, 1))
    assert next_step(executor).step_id == 3
    assert executor.wait(-math.inf) is None
    with pytest.raises(KeyError):
        executor._worker.table[0]


def test_a_plan_without_work_that_fails_ends_the_executor(open_executor, monkeypatch):
    """There is no step to report it with, and what it was to do is not done."""
    executor = open_executor()

    def fail(handle: int) -> None:
        raise KeyError(handle)

    monkeypatch.setattr(executor._worker.table, "forget", fail)
    executor.submit(SchedulerOutput(0, (), (), forget=(Handle(7),)))
    with pytest.raises(RuntimeError, match=r"a step failed: KeyError\(7\)"):
        executor.wait(math.inf)


def copies_only(copy_id, direction, src, dst) -> SchedulerOutput:
    """Return a plan that only moves KV."""
    return SchedulerOutput(NO_STEP, (), (), copies=(Copy(copy_id, direction, src, dst),))


def test_copies_run_beside_a_step_and_take_no_slot(open_executor):
    """They are handed out while the compute thread is held up, and again with the step."""
    executor = open_executor(is_checked=True)
    executor.submit(first_plan(0, 0))
    assert next_step(executor).error is None
    gate = threading.Event()
    executor._thread.submit(gate.wait)
    executor.submit(first_plan(1, 1)._replace(work=(IMPOSSIBLE,)))
    assert not executor.can_submit()
    executor.submit(copies_only(5, CopyDirection.SWAP_OUT, (3, 1), (0, 9)))
    assert executor.wait(math.inf) == ExecutorOutput((), (5,), ())
    executor.submit(copies_only(6, CopyDirection.SWAP_OUT, (3,), (10**6,)))
    assert executor.wait(math.inf) == ExecutorOutput((), (), (6,))
    gate.set()
    assert next_step(executor).step_id == 1
    assert executor.checks is not None
    assert executor.checks.num_moves == 2


def test_a_copy_belongs_to_a_plan_with_work_too(open_executor):
    """It is begun with the step, and each is reported once."""
    executor = open_executor()
    executor.submit(first_plan(0, 0))
    assert next_step(executor).error is None
    copy = Copy(3, CopyDirection.SWAP_OUT, (3,), (0,))
    work = make_work(handle=0, start=len(PROMPT), token_ids=(5,), table_from=1)
    executor.submit(SchedulerOutput(1, (), (work,), copies=(copy,)))
    steps: list[StepDone] = []
    copies: list[int] = []
    while not (steps and copies):
        output = executor.wait(math.inf)
        assert output is not None
        steps += output.steps
        copies += output.copies
    assert (copies, steps[0].error) == ([3], None)


def test_a_forgotten_request_does_not_spoil_what_a_copy_brought(open_executor):
    """Its plan has not been carried out when the copy to its place begins."""
    executor = open_executor()
    executor.submit(first_plan(0, 0))
    assert next_step(executor).error is None
    executor.submit(copies_only(0, CopyDirection.SWAP_OUT, (1, 3), (7, 8)))
    assert executor.wait(math.inf).copies == (0,)
    gate = threading.Event()
    executor._thread.submit(gate.wait)
    executor.submit(SchedulerOutput(NO_STEP, (), (), forget=(Handle(0),)))
    executor.submit(copies_only(1, CopyDirection.SWAP_IN, (8,), (1,)))
    assert executor.wait(math.inf).copies == (1,)
    gate.set()
    executor._thread.call(lambda: None)
    kv = executor._worker.kv
    assert torch.equal(kv.device.tensor[1], kv.host[8])
    assert not kv.host[8].isnan().any()


def test_free_places_of_both_tiers_can_be_spoiled(open_executor):
    """Behind what was submitted; what reads them computes NaN."""
    executor = open_executor()
    executor.submit(first_plan(0, 0))
    executor.spoil((5, 6), (2,))
    assert next_step(executor).error is None
    executor.submit(copies_only(0, CopyDirection.SWAP_OUT, (1, 3), (2, 4)))
    assert executor.wait(math.inf).copies == (0,)
    kv = executor._worker.kv
    assert not kv.host[2].isnan().any()
    executor.spoil((1, 3), (2,))
    assert kv.device.tensor[[1, 3, 5, 6]].isnan().all()
    assert kv.host[2].isnan().all()
    assert not kv.host[4].isnan().any()


def test_close_ends_a_slow_copy(open_executor):
    """A link that needs two minutes holds up nobody who leaves."""
    executor = open_executor(swap_bandwidth=1e-6)
    executor.submit(copies_only(0, CopyDirection.SWAP_OUT, tuple(range(40)), tuple(range(40))))
    assert executor.wait(time.monotonic() + 0.05) is None
    executor.close()
    assert executor.wait(-math.inf) is None


def test_copies_are_measured_before_there_are_requests(open_executor):
    """The figures of a paced link are those of its pace."""
    executor = open_executor()
    assert executor.setup.facts.num_host_blocks == int(0.001 * 2**30) // 3072
    times = executor.measure_copies()
    assert 0.0 <= times.base_s < 1.0
    assert 0.0 <= times.block_s < 1.0
    assert open_executor(swap_bandwidth=1e-6).measure_copies().block_s == pytest.approx(3.072)


def test_wake_ends_a_wait(open_executor):
    """wake ends a wait in progress, or the next one, once."""
    executor = open_executor()
    waker = threading.Timer(0.05, executor.wake)
    waker.start()
    assert executor.wait(math.inf) is None
    waker.join()
    executor.wake()
    assert executor.wait(math.inf) is None
    started = time.monotonic()
    assert executor.wait(started + 0.05) is None
    assert time.monotonic() >= started + 0.05


def test_wait_for_a_time_gone_by(open_executor):
    """A wait until the past returns at once."""
    executor = open_executor()
    assert executor.wait(time.monotonic() - 1.0) is None
    assert executor.wait(-math.inf) is None


def test_a_model_that_cannot_load_leaves_no_thread(tmp_path):
    """The constructor raises the ConfigError itself and ends its thread."""
    before = threading.active_count()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        LocalExecutor(
            EngineConfig(model=str(tmp_path)),
            tmp_path,
            num_threads=1,
            eos_token_ids=frozenset(),
            on_progress=lambda stage, fraction: None,
        )
    assert threading.active_count() == before


def test_threads_of_the_compute_thread(open_executor):
    """They are those it is given, and the thread that opened it keeps its own."""
    before = torch.get_num_threads()
    executor = open_executor(num_threads=before + 1)
    assert executor._thread.call(torch.get_num_threads) == before + 1
    assert executor.setup.num_threads == before + 1
    assert torch.get_num_threads() == before
