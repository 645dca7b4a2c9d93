"""Opens what does the work: a worker in this process, or the ranks of a model.

Rules: how many threads an operation has, and how they wait, is settled here, before torch is
loaded. Must not know: requests, what is measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastserve.host.machine import num_cores
from fastserve.launch.children import RANK_FD, command, environment
from fastserve.settings.engine import EngineConfig

if TYPE_CHECKING:
    from fastserve.executor.distributed import DistributedExecutor
    from fastserve.executor.local import LocalExecutor

# Threads that spin between steps take cores from other processes of this machine; those that
# sleep at once are woken by the kernel for every operation (docs/performance.md). This many turns
# last from one operation of a step to the next, some tens of microseconds. Without the policy,
# libgomp takes a tenth of them as soon as a second thread of the process has used torch.
WAITING = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}


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

    starter = open_starter(config, model_dir, command(RANK_FD), environment(), reserved_cores)
    return DistributedExecutor(
        config, model_dir, starter, eos_token_ids=eos_token_ids, on_progress=on_progress
    )
