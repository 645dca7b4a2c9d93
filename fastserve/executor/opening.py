"""Takes workers from settings and files to where they carry out plans.

Rules: what all ranks must have in common is chosen or agreed here, once: device, dtype, window and
limits before anything is loaded, the KV blocks of each tier between `room` and `allocate`. Runs on
the thread that the worker is used from. Must not know: how a worker does its part, how ranks are
started.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastserve.checkpoint.model_config import ModelConfig, read_model_config
from fastserve.executor.choices import Choices, choose
from fastserve.executor.facts import BlockCounts, ExecutorFacts, RankFacts, Setup
from fastserve.executor.worker import Worker
from fastserve.settings.engine import EngineConfig

logger = logging.getLogger(__name__)

WINDOWS_PER_SEQ = 64
"""Blocks beyond this many full windows for each running sequence would never be used."""


class Opened(NamedTuple):
    """A worker that is ready for plans, and what was found out on the way."""

    worker: Worker
    setup: Setup


def open_worker(
    config: EngineConfig,
    model_dir: Path,
    *,
    num_threads: int,
    eos_token_ids: frozenset[int],
    on_progress: Callable[[str, float], None],
    is_poisoned: bool = False,
    is_checked: bool = False,
    is_async: bool | None = None,
) -> Opened:
    """Open the worker of the only rank. Raises ConfigError where settings do not fit the model."""
    model_config = read_model_config(model_dir)
    choices = choose(config, model_config)
    worker = Worker(
        config,
        model_config,
        choices,
        eos_token_ids=eos_token_ids,
        is_poisoned=is_poisoned,
        is_checked=is_checked,
        is_async=is_async,
    )
    torch.set_num_threads(num_threads)
    rank = worker.load(model_dir, on_progress)
    blocks = agree_on_blocks(config, choices, [worker.room()], rank.block_bytes)
    worker.allocate(blocks, on_progress)
    return Opened(worker, describe(config, model_config, choices, blocks, [rank]))


def describe(
    config: EngineConfig,
    model_config: ModelConfig,
    choices: Choices,
    blocks: BlockCounts,
    ranks: Sequence[RankFacts],
) -> Setup:
    """Return what was found out on the way, of all ranks together."""
    facts = ExecutorFacts(
        max_model_len=choices.max_model_len,
        limits=choices.limits,
        vocab_size=model_config.vocab_size,
        num_device_blocks=blocks.device,
        num_host_blocks=blocks.host,
        block_bytes=sum(rank.block_bytes for rank in ranks),
        dtype=str(choices.dtype).removeprefix("torch."),
        device=str(choices.device),
        cpu_kernels=ranks[0].cpu_kernels,
    )
    num_threads = min(rank.num_threads for rank in ranks)
    return Setup(config=config, model_config=model_config, facts=facts, num_threads=num_threads)


def agree_on_blocks(
    config: EngineConfig, choices: Choices, rooms: Sequence[BlockCounts], block_bytes: int
) -> BlockCounts:
    """Return how many KV blocks every rank gets, of which each has room for so many.

    The least room of each tier counts. Where neither blocks nor bytes were asked for, no more are
    taken on the device than can be of use. A host tier that is smaller than was asked for is
    logged; `block_bytes` are those of the rank that has most of a block.
    """
    device, host = min(room.device for room in rooms), min(room.host for room in rooms)
    if host < config.host_kv_bytes // block_bytes:
        logger.warning(
            "--swap-space: %.2f GiB for KV in host memory, half of what is available, not %.2f",
            host * block_bytes / 2**30,
            config.swap_space,
        )
    if config.num_device_blocks is not None or config.kv_cache_memory_bytes is not None:
        return BlockCounts(device, host)
    window = -(-choices.max_model_len // config.block_size)
    return BlockCounts(min(device, WINDOWS_PER_SEQ * choices.limits.max_num_seqs * window), host)
