"""DistributedExecutor before ranks that a test plays: what it asks, what it makes of answers."""

from __future__ import annotations

import math
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fastserve.core.messages import (
    NO_STEP,
    Copy,
    CopyDirection,
    NewRequest,
    Sample,
    SchedulerOutput,
    StepDone,
)
from fastserve.core.request import Handle
from fastserve.executor.distributed import DistributedExecutor
from fastserve.settings.option import ConfigError
from fastserve.wire.engine_messages import Progress
from fastserve.wire.frames import encode_frame, read_frame
from fastserve.wire.rank_messages import (
    Allocate,
    Allocated,
    Carry,
    CopiesMeasured,
    CopyEnded,
    Load,
    Loaded,
    MeasureCopies,
    Order,
    Place,
    RankFailed,
    Report,
    StepEnded,
    Touch,
    decode_order,
)
from tests.checkpoints import make_checkpoint
from tests.core.builders import make_work
from tests.executor.driver import GREEDY
from tests.executor.ranks import config_of

TP, PP = 2, 3
COPY = Copy(7, CopyDirection.SWAP_OUT, (0, 1), (3, 2))


class PlayedRank:
    """Fits `StartedRank`: answers as `play` says, on a thread."""

    def __init__(self, rank: int, play: Callable[[int, Order], list[Report]]) -> None:
        self.connection, self._theirs = socket.socketpair()
        self.place = Place(host="here", local_rank=rank, num_local_ranks=TP * PP)
        self.orders: list[Order] = []
        self.is_killed = False
        self._rank = rank
        self._play = play
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def kill(self) -> None:
        """Note it; the driver hangs up as well."""
        self.is_killed = True

    def end(self) -> str:
        """Wait for its end."""
        self._thread.join(10)
        return "exit status 0"

    def say(self, *reports: Report) -> None:
        """Report something unasked."""
        for report in reports:
            self._theirs.sendall(encode_frame(report))

    def _run(self) -> None:
        # The driver may hang up at any time.
        with suppress(OSError), self._theirs, self._theirs.makefile("rb") as stream:
            while (payload := read_frame(stream)) is not None:
                order = decode_order(payload)
                self.orders.append(order)
                self.say(*self._play(self._rank, order))


class Cast:
    """Fits `Starter`: starts played ranks."""

    rendezvous = "file:///nowhere"

    def __init__(self, play: Callable[[int, Order], list[Report]]) -> None:
        self.ranks: dict[int, PlayedRank] = {}
        self.is_closed = False
        self._play = play

    def start(self, rank: int) -> PlayedRank:
        """Start one."""
        self.ranks[rank] = PlayedRank(rank, self._play)
        return self.ranks[rank]

    def close(self) -> None:
        """Note it."""
        self.is_closed = True

    def all_orders(self) -> list[list[Order]]:
        """Return what each rank was told, but for the first order."""
        return [self.ranks[rank].orders[1:] for rank in sorted(self.ranks)]


def play(rank: int, order: Order) -> list[Report]:
    """Answer as a rank that does all it is told, each in its own time and room."""
    match order:
        case Load():
            return [
                Loaded(
                    block_bytes=100 + rank, cpu_kernels="torch", num_threads=4 - rank % 2,
                    num_device_blocks=30 + rank, num_host_blocks=9 - rank,
                )
            ]  # fmt: skip
        case Allocate():
            return [Allocated()]
        case MeasureCopies():
            return [CopiesMeasured(0.1 * rank, 1.0 - 0.1 * rank)]
        case Carry(plan):
            copies: list[Report] = [CopyEnded(copy.copy_id, True) for copy in plan.copies]
            if not plan.work or rank % TP:
                return copies
            is_last = rank == TP * (PP - 1)
            samples = [Sample(40 + work.handle) for work in plan.work] if is_last else []
            return [*copies, StepEnded(StepDone(plan.step_id, samples, 1.0 + rank))]
    return []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Llama."""
    path: Path = tmp_path_factory.mktemp("llama")
    make_checkpoint(path, "llama")
    return path


def open_cast(checkpoint: Path, cast: Cast, **settings: Any) -> DistributedExecutor:
    """Open an executor over played ranks."""
    return DistributedExecutor(
        config_of(checkpoint, **{"tp": TP, "pp": PP, "num_device_blocks": None} | settings),
        checkpoint,
        cast,
        eos_token_ids=frozenset({1}),
        on_progress=lambda stage, fraction: None,
    )


@pytest.fixture
def opened(checkpoint: Path) -> Iterator[tuple[DistributedExecutor, Cast]]:
    """Open an executor before ranks that do all they are told."""
    cast = Cast(play)
    executor = open_cast(checkpoint, cast)
    yield executor, cast
    executor.close()
    assert cast.is_closed


def prefill(step_id: int) -> SchedulerOutput:
    """Return a step with a request of its own."""
    work = make_work(handle=step_id, num_tokens=2, token_ids=(5, 6), block_ids=(step_id,))
    return SchedulerOutput(step_id, (NewRequest(Handle(step_id), 0, 2, GREEDY, ()),), (work,))


def test_ranks_are_told_what_they_have_in_common(
    opened: tuple[DistributedExecutor, Cast],
) -> None:
    """The same but for which rank and where; the least room of all is allocated by all."""
    executor, cast = opened
    loads = [cast.ranks[rank].orders[0] for rank in range(TP * PP)]
    assert all(isinstance(load, Load) for load in loads)
    assert [load.rank for load in loads if isinstance(load, Load)] == list(range(TP * PP))
    assert cast.all_orders() == [[Allocate(30, 4)]] * (TP * PP)
    facts = executor.setup.facts
    assert (facts.num_device_blocks, facts.num_host_blocks) == (30, 4)
    assert facts.block_bytes == sum(100 + rank for rank in range(TP * PP))
    assert executor.setup.num_threads == 3
    assert (executor.num_slots, executor.lookahead) == (PP, 0)


def test_a_plan_goes_to_every_rank_and_a_step_is_the_machine_s_share(
    opened: tuple[DistributedExecutor, Cast],
) -> None:
    """What the last stage drew, and the mean of what the stages took."""
    executor, cast = opened
    plan = prefill(0)
    executor.submit(plan)
    output = executor.wait(math.inf)
    assert output is not None
    (done,) = output.steps
    assert done.samples == [Sample(40)]
    assert done.device_s == pytest.approx((1.0 + 3.0 + 5.0) / 3)
    executor.submit(SchedulerOutput(NO_STEP, (), (), copies=(COPY,), forget=(Handle(0),)))
    output = executor.wait(math.inf)
    assert output is not None
    assert (output.steps, output.copies) == ((), (7,))
    for orders in cast.all_orders():
        assert [type(order) for order in orders[1:]] == [Carry, Carry]


def test_the_slowest_rank_s_copies_count(opened: tuple[DistributedExecutor, Cast]) -> None:
    """A copy is over when it is on all of them."""
    executor, _ = opened
    assert executor.measure_copies() == pytest.approx((0.5, 1.0))


def test_a_profile_is_of_the_whole_model(opened: tuple[DistributedExecutor, Cast]) -> None:
    """The seconds of all stages together, over memory that every rank has touched."""
    executor, cast = opened
    measurements = executor.measure(lambda stage, fraction: None)
    assert len(measurements) > 5
    assert {item.seconds for item in measurements} == {9.0}
    for orders in cast.all_orders():
        touches = [order for order in orders if isinstance(order, Touch)]
        assert len(touches) == 1
        assert touches[0].num_blocks > 0


def test_a_rank_that_is_lost_ends_the_executor(opened: tuple[DistributedExecutor, Cast]) -> None:
    """Its line is what `wait` raises, now and ever after; plans meanwhile do no harm."""
    executor, cast = opened
    cast.ranks[2].say(RankFailed("ValueError: in the middle of a step"))
    with pytest.raises(
        RuntimeError, match=r"^rank 2 \(here, stage 1 of 3, shard 0 of 2\) failed: "
    ):
        executor.wait(math.inf)
    executor.submit(prefill(0))
    with pytest.raises(RuntimeError, match="rank 2"):
        executor.wait(math.inf)
    executor.close()
    assert all(rank.is_killed for rank in cast.ranks.values())


@pytest.mark.parametrize("failing", [Load, Allocate])
def test_a_rank_that_fails_at_start_ends_all_with_its_message(
    checkpoint: Path, failing: type[Order]
) -> None:
    """A misconfiguration stays one; whoever was started is gone."""
    for is_misconfiguration in (True, False):

        def fail(rank: int, order: Order) -> list[Report]:
            if rank == 4 and isinstance(order, failing):
                return [RankFailed("no room for it", is_misconfiguration)]  # noqa: B023
            return play(rank, order)

        cast = Cast(fail)
        expected = ConfigError if is_misconfiguration else RuntimeError
        with pytest.raises(expected, match="no room for it") as caught:
            open_cast(checkpoint, cast)
        assert isinstance(caught.value, ConfigError) == is_misconfiguration
        assert all(rank.is_killed for rank in cast.ranks.values())
        assert cast.is_closed


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tp": 4}, r"--tensor-parallel-size 4: .*possible: 1, 2, 6"),
        ({"pp": 5}, "--pipeline-parallel-size 5: the model has 3 layers"),
        ({"pipeline_layers": "1,1,2"}, "--pipeline-layers 1,1,2"),
        ({"max_model_len": 10**6}, "--max-model-len"),
    ],
)
def test_what_cannot_be_had_is_refused_before_ranks_start(
    checkpoint: Path, settings: dict[str, Any], reason: str
) -> None:
    """They take seconds to start, and the model minutes to load."""
    cast = Cast(play)
    with pytest.raises(ConfigError, match=reason):
        open_cast(checkpoint, cast, **settings)
    assert not cast.ranks
    assert cast.is_closed


def test_progress_is_shown_as_the_first_rank_makes_it(checkpoint: Path) -> None:
    """On the thread that opens the executor."""

    def load(rank: int, order: Order) -> list[Report]:
        progress: list[Report] = [Progress("loading weights", 0.5)] if rank == 0 else []
        return [*progress, *play(rank, order)] if isinstance(order, Load) else play(rank, order)

    shown: queue.SimpleQueue[tuple[str, float, int]] = queue.SimpleQueue()
    executor = DistributedExecutor(
        config_of(checkpoint, TP, PP),
        checkpoint,
        Cast(load),
        eos_token_ids=frozenset(),
        on_progress=lambda stage, fraction: shown.put((stage, fraction, threading.get_ident())),
    )
    executor.close()
    assert shown.get(timeout=0) == ("loading weights", 0.5, threading.get_ident())
