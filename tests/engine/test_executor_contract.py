"""What every executor owes the engine: slots, plans without work, facts, wake-ups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastserve.core.build import build_scheduler
from fastserve.core.messages import (
    NO_STEP,
    Copy,
    CopyDirection,
    ExecutorOutput,
    NewRequest,
    SchedulerOutput,
    Work,
)
from fastserve.core.request import Arrival, Handle, SamplingParams
from fastserve.engine.engine import Engine, MonotonicClock
from fastserve.engine.interfaces import Clock, Executor
from fastserve.executor.local import LocalExecutor
from fastserve.settings.engine import EngineConfig
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.clock import VirtualClock
from fastserve.sim.sim_executor import SimExecutor
from tests.checkpoints import EOS_TOKEN_ID, make_checkpoint
from tests.fake_executor import FakeExecutor
from tests.sim.machines import COSTS

BLOCK_SIZE = 8
PROMPT = tuple(range(20, 31))  # two blocks
PARAMS = SamplingParams(temperature=0.0, seed=1, max_tokens=4, ignore_eos=True)
COPY = Copy(7, CopyDirection.SWAP_OUT, (60, 61), (0, 1))

Open = Callable[[Path], tuple[Executor, Clock]]


def fake(num_slots: int, lookahead: int) -> Open:
    """Return what opens a fake device."""

    def open_one(path: Path) -> tuple[Executor, Clock]:
        clock = VirtualClock()
        return FakeExecutor(clock, BLOCK_SIZE, num_slots=num_slots, lookahead=lookahead), clock

    return open_one


def simulated(num_stages: int, lookahead: int) -> Open:
    """Return what opens a simulated device."""

    def open_one(path: Path) -> tuple[Executor, Clock]:
        clock, ends = VirtualClock(), dict.fromkeys(range(8), 99)
        return SimExecutor(clock, COSTS, ends, num_stages=num_stages, lookahead=lookahead), clock

    return open_one


def local(lookahead: int) -> Open:
    """Return what opens an executor with a tiny model."""

    def open_one(path: Path) -> tuple[Executor, Clock]:
        config = EngineConfig(
            model=str(path), device="cpu", block_size=BLOCK_SIZE, num_device_blocks=64,
            preemption_mode="reactive", swap_space=0.001,
        )  # fmt: skip
        executor = LocalExecutor(
            config, path, eos_token_ids=frozenset({EOS_TOKEN_ID}), lookahead=lookahead,
            num_threads=1, is_poisoned=True, on_progress=lambda stage, fraction: None,
        )  # fmt: skip
        return executor, MonotonicClock()

    return open_one


EXECUTORS = {
    **{f"fake-{slots}-{ahead}": fake(slots, ahead)
       for slots, ahead in ((1, 0), (1, 1), (2, 0), (4, 0))},
    **{f"simulated-{slots}-{ahead}": simulated(slots, ahead)
       for slots, ahead in ((1, 0), (1, 1), (2, 0), (4, 0))},
    "local-1-0": local(0),
    "local-1-1": local(1),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Llama."""
    path: Path = tmp_path_factory.mktemp("llama")
    make_checkpoint(path, "llama")
    return path


@pytest.fixture(params=EXECUTORS)
def opened(
    request: pytest.FixtureRequest, checkpoint: Path
) -> Iterator[tuple[int, Executor, Clock]]:
    """Open one executor of each kind; the first is how many steps may be in flight."""
    executor, clock = EXECUTORS[request.param](checkpoint)
    _, num_slots, lookahead = request.param.split("-")
    yield int(num_slots) + int(lookahead), executor, clock
    executor.close()


def prefill(step_id: int) -> SchedulerOutput:
    """Return a step with the whole prompt of a request of its own."""
    blocks = (2 * step_id, 2 * step_id + 1)
    work = Work(Handle(step_id), 0, 0, len(PROMPT), PROMPT, 0, blocks, sample=True, logits="last")
    return SchedulerOutput(
        step_id, (NewRequest(Handle(step_id), 0, len(PROMPT), PARAMS, ()),), (work,)
    )


def forgetting(*handles: int) -> SchedulerOutput:
    """Return a plan that does nothing but forget."""
    return SchedulerOutput(NO_STEP, (), (), forget=tuple(map(Handle, handles)))


def fill(executor: Executor) -> int:
    """Submit steps of disjoint requests while there are slots; return how many."""
    num_steps = 0
    while executor.can_submit():
        executor.submit(prefill(num_steps))
        num_steps += 1
    return num_steps


def steps_of(executor: Executor, count: int) -> list[int]:
    """Wait for `count` steps and return their ids; nothing else may finish."""
    ids: list[int] = []
    while len(ids) < count:
        output = executor.wait(math.inf)
        assert output is not None
        assert not output.copies
        assert all(len(done.samples) == 1 and done.error is None for done in output.steps)
        ids += [done.step_id for done in output.steps]
    return ids


def test_there_is_a_slot_for_every_step_it_promises(opened: tuple[int, Executor, Clock]) -> None:
    """Slots and lookahead, no more, and they land in the order of their plans."""
    max_steps, executor, _ = opened
    num_steps = fill(executor)
    assert num_steps == max_steps
    assert steps_of(executor, num_steps) == list(range(num_steps))
    assert executor.can_submit()


def test_a_plan_without_work_takes_no_slot_and_is_no_step(
    opened: tuple[int, Executor, Clock],
) -> None:
    """It may come before, between and after steps, though no slot is free."""
    max_steps, executor, clock = opened
    executor.submit(prefill(7))
    assert steps_of(executor, 1) == [7]
    executor.submit(forgetting(7))
    assert executor.can_submit()
    num_steps = fill(executor)
    assert num_steps == max_steps
    executor.submit(forgetting(0))
    assert not executor.can_submit()
    assert steps_of(executor, num_steps) == list(range(num_steps))
    executor.submit(prefill(6))
    assert steps_of(executor, 1) == [6]
    executor.submit(forgetting(6))
    until = clock.now() + 0.01
    assert executor.wait(until) is None
    assert clock.now() >= until


def test_a_wake_up_ends_one_wait(opened: tuple[int, Executor, Clock]) -> None:
    """The next one, if there is none; not the one after that."""
    _, executor, clock = opened
    executor.wake()
    assert executor.wait(math.inf) is None
    until = clock.now() + 0.01
    assert executor.wait(until) is None
    assert clock.now() >= until


def test_a_copy_takes_no_slot_and_is_reported_once(opened: tuple[int, Executor, Clock]) -> None:
    """Beside a full device, in its own time."""
    _, executor, _ = opened
    num_steps = fill(executor)
    if isinstance(executor, FakeExecutor):
        executor.copy_s = lambda copy: 3.5
    executor.submit(SchedulerOutput(NO_STEP, (), (), copies=(COPY,)))
    assert not executor.can_submit()
    copies: list[int] = []
    while num_steps or not copies:
        output = executor.wait(math.inf)
        assert output is not None
        assert not output.failed_copies
        copies += output.copies
        num_steps -= len(output.steps)
    assert copies == [7]


def test_a_copy_takes_its_time_beside_steps() -> None:
    """The fake device does not add the one to the other."""
    executor = FakeExecutor(VirtualClock(), BLOCK_SIZE, copy_s=lambda copy: 3.5)
    executor.submit(prefill(0))
    executor.submit(SchedulerOutput(NO_STEP, (), (), copies=(COPY,)))
    assert steps_of(executor, 1) == [0]
    assert executor.wait(math.inf) == ExecutorOutput((), (7,))
    assert executor.clock.now() == 3.5


def test_swapped_kv_is_where_the_copies_put_it() -> None:
    """The fake device goes on from other places after KV went out and came back."""
    executor = FakeExecutor(VirtualClock(), BLOCK_SIZE)
    executor.submit(prefill(0))
    steps_of(executor, 1)
    for copy in (
        Copy(0, CopyDirection.SWAP_OUT, (0, 1), (5, 4)),
        Copy(1, CopyDirection.SWAP_IN, (5, 4), (9, 8)),
    ):
        executor.submit(SchedulerOutput(NO_STEP, (), (), copies=(copy,)))
        assert executor.wait(math.inf) == ExecutorOutput((), (copy.copy_id,))
    (sample,) = executor.states[0].token_ids[len(PROMPT) :]
    moved = Work(Handle(0), 0, len(PROMPT), 1, (sample,), 0, (9, 8), sample=True, logits="last")
    executor.submit(SchedulerOutput(1, (), (moved,)))
    assert steps_of(executor, 1) == [1]


def test_a_step_may_not_touch_what_is_being_copied() -> None:
    """The fake device sees a block that moves under a step, whichever was first."""
    move = SchedulerOutput(NO_STEP, (), (), copies=(COPY._replace(src=(0, 1)),))
    for first, second in ((prefill(0), move), (move, prefill(0))):
        executor = FakeExecutor(VirtualClock(), BLOCK_SIZE)
        executor.submit(first)
        with pytest.raises(AssertionError, match="moves"):
            executor.submit(second)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_an_idle_worker_knows_no_request(checkpoint: Path, lookahead: int) -> None:
    """Aborted between two steps and under one: nothing else is planned, and its state goes."""
    executor, clock = local(lookahead)(checkpoint)
    assert isinstance(executor, LocalExecutor)
    config = SchedulerConfig(
        max_num_seqs=4, max_num_batched_tokens=64, max_model_len=128, block_size=BLOCK_SIZE,
        lookahead=lookahead, is_strict=True,
    )  # fmt: skip
    engine = Engine(build_scheduler(config, COSTS, 64), executor, clock)
    table = executor._worker.table
    params = SamplingParams(temperature=0.0, max_tokens=99, ignore_eos=True)
    for _ in range(2):  # at lookahead 1 a step is in flight at each abort
        handle = engine.add(Arrival(PROMPT, params))
        engine.step()
        engine.step()
        assert len(table) == 1
        assert engine.abort(handle) is not None
        while not engine.is_idle:
            engine.step()
        executor._thread.call(lambda: None)  # plans before it have been carried out
        assert len(table) == 0
    engine.close()
