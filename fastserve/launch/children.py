"""How processes of ours are started, and what they find in their environment.

Rules: `python -m fastserve.launch` is each of them; a flag says which, and on which inherited
socket. Must not know: what they do.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import fastserve
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError

ENGINE_FD, RANK_FD = "--engine-fd", "--rank-fd"


def command(flag: str) -> tuple[str, ...]:
    """Return what starts a process of ours; the number of an inherited socket is appended."""
    # -P: a file in the working directory must not stand in for a module.
    return sys.executable, "-P", "-m", "fastserve.launch", flag


def environment() -> dict[str, str]:
    """Return what such a process needs beyond what it inherits."""
    package_root = str(Path(fastserve.__file__).resolve().parent.parent)
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
