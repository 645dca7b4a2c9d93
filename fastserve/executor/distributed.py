"""DistributedExecutor: one model over several ranks, each a process of its own.

    submit ─► encoded once ─► every rank: copies at once, work in its turn
    a step is done when every stage has said so; the last one says what was drawn
    a copy is done when every rank has said so

Rules: ranks obey, and decide nothing. As many steps as there are stages are in flight, of disjoint
requests; there is no lookahead. A rank that fails, dies or falls silent ends the executor: others
may wait inside a step for what will never come. Must not know: scheduling, how ranks are started,
torch.distributed.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from fastserve.checkpoint.model_config import read_model_config
from fastserve.core.messages import ExecutorOutput, SchedulerOutput, StepDone
from fastserve.executor.choices import choose
from fastserve.executor.copy_times import CopyTimes
from fastserve.executor.facts import BlockCounts, RankFacts, Setup
from fastserve.executor.fitting import Measurement
from fastserve.executor.in_flight import InFlight
from fastserve.executor.layout import Layout
from fastserve.executor.opening import agree_on_blocks, describe
from fastserve.executor.profiler import measure, num_profiled_blocks
from fastserve.executor.rank_link import RankLink
from fastserve.executor.starting import Starter
from fastserve.executor.tally import Tally
from fastserve.model.parallel import Parts
from fastserve.model.stages import split_layers
from fastserve.settings.engine import EngineConfig
from fastserve.wire.engine_messages import Progress
from fastserve.wire.frames import encode_frame
from fastserve.wire.rank_messages import (
    Allocate,
    Allocated,
    Carry,
    CopiesMeasured,
    CopyEnded,
    CountMoves,
    Load,
    Loaded,
    MeasureCopies,
    MovesCounted,
    Order,
    Place,
    Report,
    StepEnded,
    Touch,
)

R = TypeVar("R", bound=Report)


class DistributedExecutor:
    """Fits engine.interfaces.Executor; `setup` is what was found out in opening."""

    lookahead = 0

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        starter: Starter,
        *,
        eos_token_ids: frozenset[int],
        on_progress: Callable[[str, float], None],
        is_poisoned: bool = False,
        is_checked: bool = False,
    ) -> None:
        """Start the ranks and let them load; raises ConfigError or RuntimeError as one did."""
        self.layout = Layout.of(config)
        self.num_slots = self.layout.pipeline_parallel_size
        self._on_progress = on_progress
        self._replies: queue.SimpleQueue[tuple[int, Report] | Exception] = queue.SimpleQueue()
        self._in_flight = InFlight(self.num_slots, self.lookahead)
        self._tally = Tally(self.layout, self._in_flight)
        self._starter = starter
        self._links: list[RankLink] = []
        try:
            self.setup = self._open(config, model_dir, eos_token_ids, is_poisoned, is_checked)
        except BaseException:
            self._in_flight.fail("it was not opened")  # what has been started is of no use
            self.close()
            raise

    def _open(
        self,
        config: EngineConfig,
        model_dir: Path,
        eos_token_ids: frozenset[int],
        is_poisoned: bool,
        is_checked: bool,
    ) -> Setup:
        layout, starter = self.layout, self._starter
        model_config = read_model_config(model_dir)
        choices = choose(config, model_config)
        # What cannot be had is refused before ranks start.
        Parts.of(model_config).check(layout.tensor_parallel_size)
        split_layers(model_config, layout.pipeline_parallel_size, config.layers_by_stage)

        def greet(rank: int, place: Place) -> Load:
            return Load(
                rank=rank,
                place=place,
                rendezvous=starter.rendezvous,
                config=config,
                model_dir=str(model_dir),
                device_type=choices.device.type,
                dtype=str(choices.dtype).removeprefix("torch."),
                max_model_len=choices.max_model_len,
                limits=choices.limits,
                eos_token_ids=eos_token_ids,
                is_poisoned=is_poisoned,
                is_checked=is_checked,
            )

        for rank in range(layout.num_ranks):
            self._links.append(RankLink(rank, layout.describe(rank), starter.start, greet, self))
        loaded = self._all(Loaded)
        rooms = [BlockCounts(rank.num_device_blocks, rank.num_host_blocks) for rank in loaded]
        blocks = agree_on_blocks(config, choices, rooms, max(rank.block_bytes for rank in loaded))
        self._order(Allocate(*blocks))
        self._all(Allocated)
        ranks = [
            RankFacts(
                block_bytes=rank.block_bytes,
                cpu_kernels=rank.cpu_kernels,
                num_threads=rank.num_threads,
            )
            for rank in loaded
        ]
        return describe(config, model_config, choices, blocks, ranks)

    # ── what the engine asks ─────────────────────────────────────────────────────────────────

    def can_submit(self) -> bool:
        """Whether a compute slot is free."""
        return self._in_flight.can_begin()

    def submit(self, plan: SchedulerOutput) -> None:
        """Send a plan to every rank and return at once."""
        self._in_flight.begin(plan)
        self._order(Carry(plan))

    def wait(self, until: float) -> ExecutorOutput | None:
        """Return everything that finished, or None once woken or late."""
        return self._in_flight.wait(until)

    def wake(self) -> None:
        """End a `wait` in progress, or the next one."""
        self._in_flight.wake()

    def close(self) -> None:
        """End all ranks; those of a model of which one is lost are killed, wherever they wait."""
        for link in self._links:
            link.hang_up(is_killed=self._in_flight.has_failed)
        self._starter.close()  # which waits for no more ranks
        for link in self._links:
            link.join()

    # ── before there are requests ────────────────────────────────────────────────────────────

    def measure(self, on_progress: Callable[[str, float], None]) -> list[Measurement]:
        """Measure step times while no request is known: KV from the start of the pool is lost.

        A step takes what it takes all stages together: the whole model's seconds.
        """
        self._order(Touch(num_profiled_blocks(self.setup)))
        return measure(self.setup, self._execute, on_progress)

    def _execute(self, plan: SchedulerOutput) -> StepDone:
        self.submit(plan)
        if not plan.work:
            return StepDone(plan.step_id, (), 0.0)
        output = self.wait(float("inf"))
        assert output is not None, "nobody wakes what is not served yet"
        (done,) = output.steps
        return done._replace(device_s=done.device_s * self.num_slots)

    def measure_copies(self) -> CopyTimes:
        """Measure copies between the tiers, on all ranks at once; the slowest counts."""
        self._order(MeasureCopies())
        times = self._all(CopiesMeasured)
        return CopyTimes(max(rank.base_s for rank in times), max(rank.block_s for rank in times))

    def count_moves(self) -> Sequence[MovesCounted]:
        """Return what became of the blocks that moved on each rank, where `is_checked`."""
        self._order(CountMoves())
        return self._all(MovesCounted)

    # ── what ranks say, each on a thread of its own ──────────────────────────────────────────

    def heard(self, rank: int, report: Report) -> None:
        """Fit `Listener`."""
        match report:
            case StepEnded(done):
                self._tally.step_ended(rank, done)
            case CopyEnded(copy_id, is_done):
                self._tally.copy_ended(copy_id, is_done)
            case _:
                self._replies.put((rank, report))

    def lost(self, rank: int, error: Exception) -> None:
        """Fit `Listener`."""
        self._in_flight.fail(str(error), error)
        self._replies.put(error)

    def _order(self, order: Order) -> None:
        frame = encode_frame(order)
        for link in self._links:
            link.send(frame)

    def _all(self, kind: type[R]) -> list[R]:
        """Wait until every rank has replied in kind; raises what was heard of one that is lost."""
        replies: dict[int, R] = {}
        while len(replies) < len(self._links):
            reply = self._replies.get()
            if isinstance(reply, Exception):
                raise reply
            rank, report = reply
            if isinstance(report, Progress):
                self._on_progress(report.stage, report.fraction)
            elif isinstance(report, kind):
                replies[rank] = report
            else:
                raise RuntimeError(f"rank {rank} says {report!r} where {kind.__name__} is expected")
        return [replies[rank] for rank in sorted(replies)]
