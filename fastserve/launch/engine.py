"""Opens an engine in this process: an executor, what it measured, a scheduler over both.

Must not know: how text is served.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.checkpoint import locate as checkpoint
from fastserve.core.build import build_scheduler
from fastserve.core.cost_model import CostModel
from fastserve.core.journal import Journal
from fastserve.core.lengths import LengthModel
from fastserve.engine import process
from fastserve.engine.engine import Engine, MonotonicClock
from fastserve.engine.interfaces import Observer
from fastserve.engine.journal_file import open_journal
from fastserve.engine.length_file import LengthFile, length_path
from fastserve.launch.executor import open_executor
from fastserve.launch.tokenizer import tokenizer_dir
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.settings.scheduler import SchedulerConfig, pool_window
from fastserve.text.tokenizer import Tokenizer
from fastserve.wire.engine_messages import Configure, EngineInfo

if TYPE_CHECKING:
    from fastserve.executor.distributed import DistributedExecutor
    from fastserve.executor.facts import ExecutorFacts
    from fastserve.executor.local import LocalExecutor

SERVER_CORES = 1  # the API process': text, HTTP and the other end of the socket
logger = logging.getLogger(__name__)


def open_engine(
    config: EngineConfig,
    on_progress: Callable[[str, float], None] = lambda stage, fraction: None,
    *,
    reserved_cores: int = 0,
    length_model: LengthModel | None = None,
    is_restart: bool = False,
) -> tuple[Engine, EngineInfo]:
    """Load a model into this process; `reserved_cores` are left to others.

    A policy that learns begins with the `length_model`, or with nothing. At a restart a journal
    that cannot be written is left out: there are requests that wait.
    """
    directory = checkpoint.locate(config.model, config.revision)
    eos_token_ids = checkpoint.eos_token_ids(
        directory, of_tokenizer=Tokenizer.find_eos(tokenizer_dir(config))
    )
    sampling_defaults = (
        checkpoint.sampling_defaults(directory) if config.generation_config == "auto" else {}
    )
    executor = open_executor(
        config,
        directory,
        eos_token_ids=eos_token_ids,
        on_progress=on_progress,
        reserved_cores=reserved_cores,
    )
    with contextlib.ExitStack() as opened:  # closed here if anything below fails
        opened.callback(executor.close)
        facts = executor.setup.facts
        scheduler_config = SchedulerConfig.resolve(
            config,
            facts.limits,
            max_model_len=pool_window(
                facts.max_model_len, facts.num_device_blocks, config.block_size
            ),
            num_slots=executor.num_slots,
            lookahead=executor.lookahead,
            eos_token_ids=eos_token_ids,
        )
        cost_model = _measure(executor, on_progress)
        clock = MonotonicClock()
        built_from = scheduler_config, cost_model, facts.num_device_blocks, facts.num_host_blocks
        observers: list[Observer] = []
        if config.journal is not None:

            def begin(journal: Journal) -> None:
                journal.open(clock.now(), *built_from, length_model)

            observers += _open_journal(config.journal, opened, begin, is_restart=is_restart)
        scheduler = build_scheduler(*built_from, length_model=length_model)
        info = _info(config, scheduler_config, facts, cost_model, sampling_defaults)
        return Engine(scheduler, executor, clock, observers, opened.pop_all().close), info


def _measure(
    executor: LocalExecutor | DistributedExecutor, on_progress: Callable[[str, float], None]
) -> CostModel:
    """Return what steps take on this machine, measured once, and copies as they are now."""
    from fastserve.executor.copy_times import NO_LINK  # these load torch
    from fastserve.executor.profile_file import load_or_measure

    # As `--swap-bandwidth` has the link: no part of a profile.
    link = executor.measure_copies() if executor.setup.facts.num_host_blocks else NO_LINK
    return dataclasses.replace(
        load_or_measure(executor.setup, lambda: executor.measure(on_progress)),
        copy_base_s=link.base_s,
        copy_block_s=link.block_s,
    )


def _open_journal(
    path: str,
    opened: contextlib.ExitStack,
    begin: Callable[[Journal], None],
    *,
    is_restart: bool,
) -> list[Journal]:
    """Return the journal, begun, which `opened` closes; none if it cannot be at a restart."""
    try:
        journal = opened.enter_context(open_journal(Path(path)))
        begin(journal)
    except OSError as error:
        reason = f"--journal {path}: {error.strerror}"
        if not is_restart:
            raise ConfigError(reason) from error
        logger.error("the engine goes on without its journal: %s", reason)
        return []
    return [journal]


def _info(
    config: EngineConfig,
    scheduler_config: SchedulerConfig,
    facts: ExecutorFacts,
    cost_model: CostModel,
    sampling_defaults: dict[str, Any],
) -> EngineInfo:
    """Return what is told of the engine."""
    return EngineInfo(
        model=config.model,
        max_model_len=facts.max_model_len,
        max_request_tokens=scheduler_config.max_model_len,
        vocab_size=facts.vocab_size,
        block_size=config.block_size,
        num_device_blocks=facts.num_device_blocks,
        num_host_blocks=facts.num_host_blocks,
        block_bytes=facts.block_bytes,
        eos_token_ids=scheduler_config.eos_token_ids,
        dtype=facts.dtype,
        device=facts.device,
        cost_model=cost_model,
        max_num_seqs=scheduler_config.max_num_seqs,
        enable_prefix_caching=config.enable_prefix_caching,
        quantization=config.quantization,
        tensor_parallel_size=config.tensor_parallel_size,
        pipeline_parallel_size=config.pipeline_parallel_size,
        sampling_defaults=sampling_defaults,
    )


def open_served_engine(
    configure: Configure, on_progress: Callable[[str, float], None]
) -> process.Opened:
    """Load a model to serve: a policy that learns goes on where the last engine ended.

    Each replica learns from its own answers, in a file of its own; one that has none begins with
    that of replica 0.
    """
    config, replica = configure.config, configure.replica
    lengths = None
    if config.scheduling_policy == "learned":
        identity = str(checkpoint.locate(config.model, config.revision).resolve())
        first, own = (length_path(config.model, identity, which) for which in (0, replica))
        lengths = LengthFile(own, identity, MonotonicClock().now(), begin_with=first)
    engine, info = open_engine(
        config,
        on_progress,
        reserved_cores=SERVER_CORES,
        length_model=None if lengths is None else lengths.model,
        is_restart=configure.is_restart,
    )
    return process.Opened(engine, info, lengths)


def require_one_engine(config: EngineConfig, caller: str) -> None:
    """Raise ConfigError where several replicas are asked of what runs one engine by itself."""
    if config.data_parallel_size > 1:
        raise ConfigError(
            f"--data-parallel-size: {caller} runs one engine, in its own process; "
            "fastserve serve runs several"
        )
