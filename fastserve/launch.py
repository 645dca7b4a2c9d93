"""The composition root: names the parts, hands them to each other, starts the server.

`python -m fastserve.launch --engine-fd N` is the engine process, `--rank-fd N` one rank of a
distributed model. Rules: this is where the torch
rooms and the core meet; they are imported inside the functions that need them, so that the API
process loads no torch. Must not know: how any part works.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastserve.checkpoint import locate as checkpoint
from fastserve.client.async_engine import AsyncEngine
from fastserve.core.build import build_scheduler
from fastserve.core.lengths import LengthModel
from fastserve.engine import process
from fastserve.engine.engine import Engine, MonotonicClock
from fastserve.engine.journal_file import open_journal
from fastserve.engine.length_file import LengthFile, length_path
from fastserve.host.log import end_process, open_log
from fastserve.host.machine import num_cores
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.settings.scheduler import SchedulerConfig, pool_window
from fastserve.settings.server import ENGINE_TIMEOUT_S, ServerConfig
from fastserve.text.render_pool import RenderPool
from fastserve.text.tokenizer import Tokenizer
from fastserve.wire.child import be_child
from fastserve.wire.driver_link import DriverLink
from fastserve.wire.engine_messages import Configure, EngineInfo

if TYPE_CHECKING:
    from fastserve.executor.distributed import DistributedExecutor
    from fastserve.executor.local import LocalExecutor

# Threads that spin between steps take cores from other processes of this machine; those that
# sleep at once are woken by the kernel for every operation (docs/performance.md). This many turns
# last from one operation of a step to the next, some tens of microseconds. Without the policy,
# libgomp takes a tenth of them as soon as a second thread of the process has used torch.
WAITING = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
# What a process that renders templates finds in its environment, besides where the package is.
KEPT_FOR_TEMPLATES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")
SERVER_CORES = 1  # the API process': text, HTTP and the other end of the socket
logger = logging.getLogger(__name__)


def count_threads(config: EngineConfig, reserved_cores: int = 0) -> int:
    """Return the threads of one CPU operation: as told, else its share of the cores.

    Replicas, and the ranks of each, divide what is left of all cores without the reserved ones.
    """
    share = (num_cores() - reserved_cores) // (config.data_parallel_size * config.num_ranks)
    return config.num_threads or max(1, share)


def open_executor(
    config: EngineConfig,
    model_dir: Path,
    *,
    eos_token_ids: frozenset[int],
    on_progress: Callable[[str, float], None],
    reserved_cores: int,
) -> LocalExecutor | DistributedExecutor:
    """Load a model; how the threads of torch wait is settled here, unless torch has been loaded."""
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in WAITING.items():
            os.environ.setdefault(name, value)  # read once, when torch loads its thread pool
    backend = config.distributed_executor_backend
    if config.num_ranks > 1 or backend in ("mp", "ray"):
        return _open_ranks(
            config,
            model_dir,
            eos_token_ids=eos_token_ids,
            on_progress=on_progress,
            reserved_cores=reserved_cores,
        )
    from fastserve.executor.local import LocalExecutor

    return LocalExecutor(
        config,
        model_dir,
        num_threads=count_threads(config, reserved_cores),
        eos_token_ids=eos_token_ids,
        on_progress=on_progress,
    )


def _open_ranks(
    config: EngineConfig,
    model_dir: Path,
    *,
    eos_token_ids: frozenset[int],
    on_progress: Callable[[str, float], None],
    reserved_cores: int,
) -> DistributedExecutor:
    """Load a model into several processes."""
    from fastserve.executor.distributed import DistributedExecutor
    from fastserve.executor.starters import open_starter

    starter = open_starter(config, model_dir, _command("--rank-fd"), _environment(), reserved_cores)
    return DistributedExecutor(
        config, model_dir, starter, eos_token_ids=eos_token_ids, on_progress=on_progress
    )


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
        directory, of_tokenizer=Tokenizer.find_eos(_tokenizer_dir(config))
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
        from fastserve.executor.copy_times import NO_LINK  # these load torch
        from fastserve.executor.profile_file import load_or_measure

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
        # Of the link as it is now, and as `--swap-bandwidth` has it: no part of a profile.
        link = executor.measure_copies() if facts.num_host_blocks else NO_LINK
        cost_model = dataclasses.replace(
            load_or_measure(executor.setup, lambda: executor.measure(on_progress)),
            copy_base_s=link.base_s,
            copy_block_s=link.block_s,
        )
        clock = MonotonicClock()
        observers = []
        if config.journal is not None:
            try:
                journal = opened.enter_context(open_journal(Path(config.journal)))
                journal.open(
                    clock.now(),
                    scheduler_config,
                    cost_model,
                    facts.num_device_blocks,
                    facts.num_host_blocks,
                    length_model,
                )
            except OSError as error:
                reason = f"--journal {config.journal}: {error.strerror}"
                if not is_restart:
                    raise ConfigError(reason) from error
                logger.error("the engine goes on without its journal: %s", reason)
            else:
                observers.append(journal)
        scheduler = build_scheduler(
            scheduler_config,
            cost_model,
            facts.num_device_blocks,
            facts.num_host_blocks,
            length_model=length_model,
        )
        info = EngineInfo(
            model=config.model,
            max_model_len=facts.max_model_len,
            max_request_tokens=scheduler_config.max_model_len,
            vocab_size=facts.vocab_size,
            block_size=config.block_size,
            num_device_blocks=facts.num_device_blocks,
            num_host_blocks=facts.num_host_blocks,
            block_bytes=facts.block_bytes,
            eos_token_ids=eos_token_ids,
            dtype=facts.dtype,
            device=facts.device,
            cost_model=cost_model,
            max_num_seqs=scheduler_config.max_num_seqs,
            enable_prefix_caching=config.enable_prefix_caching,
            tensor_parallel_size=config.tensor_parallel_size,
            pipeline_parallel_size=config.pipeline_parallel_size,
            sampling_defaults=sampling_defaults,
        )
        return Engine(scheduler, executor, clock, observers, opened.pop_all().close), info


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


def open_async_engine(
    config: EngineConfig,
    model_name: str | None = None,
    engine_timeout_s: float = ENGINE_TIMEOUT_S,
) -> AsyncEngine:
    """Return an engine that will run in processes of its own; `start` begins to load it."""
    return AsyncEngine(
        config,
        _command("--engine-fd"),
        environment=_environment(),
        replica_environments=[
            replica_environment(config, replica) for replica in range(config.data_parallel_size)
        ],
        model_name=model_name,
        engine_timeout_s=engine_timeout_s,
    )


def _command(flag: str) -> tuple[str, ...]:
    """Return what starts a process of ours; the number of an inherited socket is appended."""
    # -P: a file in the working directory must not stand in for a module.
    return sys.executable, "-P", "-m", "fastserve.launch", flag


def _environment() -> dict[str, str]:
    """Return what such a process needs beyond what it inherits."""
    package_root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (package_root, inherited)))}


def replica_environment(config: EngineConfig, replica: int) -> Mapping[str, str]:
    """Return what tells a replica which CUDA devices are its own, where several share a host.

    Raises ConfigError where the environment names fewer devices than all of them need.
    """
    if config.data_parallel_size == 1 or config.device == "cpu":
        return {}
    if config.distributed_executor_backend == "ray":  # which gives each rank a device
        return {}
    num_own = config.tensor_parallel_size * config.pipeline_parallel_size
    num_needed = num_own * config.data_parallel_size
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = list(map(str, range(num_needed))) if named is None else named.split(",")
    if named and len(devices) < num_needed:
        raise ConfigError(
            f"--data-parallel-size {config.data_parallel_size}: {num_needed} devices are needed, "
            f"and CUDA_VISIBLE_DEVICES names {len(devices)}"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices[replica * num_own :][:num_own])}


def require_one_engine(config: EngineConfig, caller: str) -> None:
    """Raise ConfigError where several replicas are asked of what runs one engine by itself."""
    if config.data_parallel_size > 1:
        raise ConfigError(
            f"--data-parallel-size: {caller} runs one engine, in its own process; "
            "fastserve serve runs several"
        )


def open_tokenizer(config: EngineConfig, chat_template: str | None = None) -> Tokenizer | None:
    """Load the tokenizer; None when the model has none and no other is named."""
    directory = _tokenizer_dir(config)
    if config.tokenizer is None and not Tokenizer.is_in(directory):
        logger.warning(Tokenizer.why_none(directory))
        return None
    tokenizer = Tokenizer.load(directory, chat_template)
    vocab_size = checkpoint.vocab_size(checkpoint.locate(config.model, config.revision))
    if vocab_size is not None:
        tokenizer.check_fits(vocab_size, directory)
    return tokenizer


def open_rendering(tokenizer: Tokenizer | None) -> RenderPool | None:
    """Return what renders a model's chat template, in processes of its own; None: it has none."""
    if tokenizer is None or tokenizer.chat_template is None:
        return None
    kept = {name: os.environ[name] for name in KEPT_FOR_TEMPLATES if name in os.environ}
    return RenderPool(
        tokenizer.chat_template,
        tokenizer.special_tokens,
        (sys.executable, "-P", "-m", "fastserve.text.render_process"),
        {**kept, **_environment()},
    )


def _tokenizer_dir(config: EngineConfig) -> Path:
    if config.tokenizer is None:
        return checkpoint.locate(config.model, config.revision)
    return checkpoint.locate(config.tokenizer, holds=("tokenizer.json", "vocab.json"))


def serve(config: EngineConfig, server_config: ServerConfig) -> int:
    """Serve over HTTP until a signal; return the exit status.

    A host other than the first only runs its ranks.
    """
    if config.node_rank > 0:
        return run_host(config, server_config.log_level)
    from fastserve.server import listen
    from fastserve.server.app import create_app
    from fastserve.server.key_sources import read_keys

    open_log(server_config.log_level.upper())
    server_config = dataclasses.replace(server_config, api_key=read_keys(server_config, os.environ))
    tokenizer = open_tokenizer(config, server_config.chat_template)
    with listen.bind(server_config.host, server_config.port) as listener:
        listen.warn_if_exposed(listener, server_config)
        names = (*server_config.served_model_name, checkpoint.public_name(config.model))
        engine = open_async_engine(config, names[0], server_config.engine_timeout)
        rendering = open_rendering(tokenizer)
        app = create_app(engine, tokenizer, rendering, config, server_config)

        def refuse_work() -> None:
            app.state.context.is_draining = True

        return listen.run(app, engine, listener, refuse_work, server_config, rendering)


def run_host(config: EngineConfig, log_level: str) -> int:
    """Run the ranks of a host that does not serve; return the exit status."""
    from fastserve.executor.host_ranks import open_host_ranks
    from fastserve.wire.joining import JoinError

    open_log(log_level.upper())
    model_dir = checkpoint.locate(config.model, config.revision)
    host, ranks = open_host_ranks(config, model_dir, _command("--rank-fd"), _environment())
    try:
        return host.serve(ranks)
    except JoinError as error:
        sys.stderr.write(f"fastserve: error: {error}\n")
        return 1


def run_rank(fd: int) -> int:
    """Be a rank on the inherited socket `fd`; it is heard before torch is loaded."""
    link = DriverLink(be_child(fd))
    from fastserve.executor import rank

    return rank.run(link)


def main(argv: Sequence[str] | None = None) -> int:
    """Be the engine process, or a rank."""
    parser = argparse.ArgumentParser(prog="python -m fastserve.launch")
    end = parser.add_mutually_exclusive_group(required=True)
    end.add_argument("--engine-fd", type=int, help="inherited socket to be the engine process on")
    end.add_argument("--rank-fd", type=int, help="inherited socket to be a rank on")
    args = parser.parse_args(argv)
    open_log("WARNING")
    if args.rank_fd is not None:
        return run_rank(args.rank_fd)
    return process.run(args.engine_fd, open_served_engine)


if __name__ == "__main__":
    # All is closed by now; libraries whose threads are still about may abort an orderly exit.
    end_process(main())
