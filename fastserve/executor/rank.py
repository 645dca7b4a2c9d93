"""Rank: one process of a distributed model, which carries out the plans it is sent.

    Load ─► meet the others, read the weights ─► Loaded ─► Allocate ─► Allocated ─► Carry …

Rules: everything torch happens on the thread that calls `run`, in the order of the plans; what must
not wait for a step in progress happens where orders arrive: copies begin, and hidden state is
received ahead of need. A step that fails ends the rank: others may wait inside it for what will
never come. What ranks must have in common is in the first order. Must not know: scheduling, what
other ranks are at, who started it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import assert_never

import torch

from fastserve.checkpoint.model_config import read_model_config
from fastserve.core.messages import SchedulerOutput
from fastserve.executor.choices import Choices
from fastserve.executor.collectives import PeerLostError, meet
from fastserve.executor.facts import BlockCounts
from fastserve.executor.layout import Layout
from fastserve.executor.worker import Worker
from fastserve.host.garbage_collector import quiet_garbage_collector
from fastserve.host.machine import num_cores
from fastserve.model.stages import split_layers
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.wire.driver_link import DriverLink
from fastserve.wire.engine_messages import Progress
from fastserve.wire.rank_messages import (
    Allocate,
    Allocated,
    Carry,
    CopiesMeasured,
    CopyEnded,
    CountMoves,
    Leave,
    Load,
    Loaded,
    MeasureCopies,
    MovesCounted,
    Order,
    Place,
    RankFailed,
    StepEnded,
    Touch,
)

logger = logging.getLogger(__name__)


def run(link: DriverLink) -> int:
    """Be a rank until the driver leaves, which ends the process, or until one's own failure."""
    try:
        load = link.get()
        if not isinstance(load, Load):
            raise ValueError(f"expected a load order first, got {type(load).__name__}")
        Rank(link, load).serve()
    except ConfigError as error:  # which needs no more than its one line
        link.report(RankFailed(_one_line(error), is_misconfiguration=True))
    except PeerLostError as error:
        link.report(RankFailed(_one_line(error), is_of_peer=True))
    except Exception as error:
        logger.exception("the rank failed")
        link.report(RankFailed(f"{type(error).__name__}: {_one_line(error)}".removesuffix(": ")))
    return 1


class Rank:
    """A loaded worker between orders and reports."""

    def __init__(self, link: DriverLink, load: Load) -> None:
        """Meet the other ranks, and load this one's part of the model."""
        self._link = link
        self._layout = layout = Layout.of(load.config)
        self._rank = load.rank
        torch.set_num_threads(count_threads(load.config, load.place))
        model_dir = Path(load.place.model_dir or load.model_dir)
        model_config = read_model_config(model_dir)
        choices = _choices(load)
        peers = meet(
            load.rank,
            layout,
            load.rendezvous,
            hidden_size=model_config.hidden_size,
            dtype=choices.dtype,
            device=choices.device,
            is_deterministic=load.config.deterministic,
        )
        stages = split_layers(
            model_config, layout.pipeline_parallel_size, load.config.layers_by_stage
        )
        self._worker = Worker(
            load.config,
            model_config,
            choices,
            eos_token_ids=load.eos_token_ids,
            stage=stages[layout.stage_of(load.rank)],
            peers=peers,
            num_local_ranks=load.place.num_local_ranks,
            is_poisoned=load.is_poisoned,
            is_checked=load.is_checked,
            is_async=False,
        )
        facts = self._worker.load(model_dir, self._on_progress)
        room = self._worker.room()
        link.report(
            Loaded(
                block_bytes=facts.block_bytes,
                cpu_kernels=facts.cpu_kernels,
                num_threads=facts.num_threads,
                num_device_blocks=room.device,
                num_host_blocks=room.host,
            )
        )

    def serve(self) -> None:
        """Obey orders, without end."""
        while True:
            self._obey(self._link.get())

    def _obey(self, order: Order) -> None:
        match order:
            case Carry(plan):
                self._carry(plan)
            case Allocate(num_device_blocks, num_host_blocks):
                blocks = BlockCounts(num_device_blocks, num_host_blocks)
                self._worker.allocate(blocks, self._on_progress)
                self._link.on_arrival = self._begin
                quiet_garbage_collector()
                self._link.report(Allocated())
            case Touch(num_blocks):
                self._worker.kv.touch(num_blocks)
            case MeasureCopies():
                self._link.report(CopiesMeasured(*self._worker.measure_copies()))
            case CountMoves():
                checks = self._worker.checks
                assert checks is not None, "what is not checked cannot be counted"
                self._link.report(MovesCounted(checks.num_moves, checks.num_mismatches))
            case Load() | Leave():
                raise ValueError(f"an order out of place: {type(order).__name__}")
            case _:
                assert_never(order)

    def _begin(self, order: Order) -> None:
        """Do what waits for no step: callable from the thread that orders arrive on."""
        if isinstance(order, Carry):
            for copy in order.plan.copies:
                self._worker.move(copy, self._report_copy)
            self._worker.expect(order.plan)

    def _report_copy(self, copy_id: int, is_done: bool) -> None:
        self._link.report(CopyEnded(copy_id, is_done))

    def _carry(self, plan: SchedulerOutput) -> None:
        if plan.work:
            self._link.step_id = plan.step_id
        done = self._worker.execute(plan)
        if plan.work and self._layout.is_leader(self._rank):
            self._link.report(StepEnded(done))

    @property
    def _on_progress(self) -> Callable[[str, float], None]:
        """The first rank speaks for all: the others are at the same."""
        if self._rank == 0:
            return lambda stage, fraction: self._link.report(Progress(stage, fraction))
        return lambda stage, fraction: None


def count_threads(config: EngineConfig, place: Place) -> int:
    """Return the threads of one CPU operation: as told, else an equal part of the host's cores."""
    num_parts = place.num_local_ranks * config.data_parallel_size
    return config.num_threads or max(1, (num_cores() - place.reserved_cores) // num_parts)


def _choices(load: Load) -> Choices:
    """Return what was chosen for all ranks, on the device that is this one's."""
    dtype: torch.dtype = getattr(torch, load.dtype)
    device = torch.device(load.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", load.place.local_rank)
        torch.cuda.set_device(device)
    return Choices(device=device, dtype=dtype, max_model_len=load.max_model_len, limits=load.limits)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
