"""Chooses what starts the ranks: children of this process, other hosts, Ray.

Must not know: how a rank is started.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastserve.executor.choices import choose_device
from fastserve.executor.host_ranks import DEFAULT_PORT, local_ranks, read_secret, route_of
from fastserve.executor.joined_ranks import HostsStarter, JoinedRanks, meeting_point
from fastserve.executor.starting import ChildStarter, Starter
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.wire.joining import Listener
from fastserve.wire.links import free_port
from fastserve.wire.terms import terms


def open_starter(
    config: EngineConfig,
    model_dir: Path,
    command: Sequence[str],  # starts a rank; the number of an inherited socket is appended
    environment: Mapping[str, str],  # of a rank, beyond what it inherits
    reserved_cores: int,
) -> Starter:
    """Return what starts the ranks. Raises ConfigError for settings that cannot be honoured."""
    if config.distributed_executor_backend == "ray":
        return _over_ray(config, model_dir, command, environment)
    if config.nnodes == 1:
        return ChildStarter(
            command, {**os.environ, **environment}, config.num_ranks, reserved_cores
        )
    return _over_hosts(config, model_dir, command, environment, reserved_cores)


def _over_hosts(
    config: EngineConfig,
    model_dir: Path,
    command: Sequence[str],
    environment: Mapping[str, str],
    reserved_cores: int,
) -> HostsStarter:
    address = config.master_addr
    assert address is not None, "checked with the settings"
    if config.node_rank > 0:
        raise ConfigError(
            f"--node-rank {config.node_rank}: only `fastserve serve` runs such a host"
        )
    ours = local_ranks(config)
    listener = Listener(
        address,
        config.master_port or DEFAULT_PORT,
        read_secret(config),
        terms(config, model_dir),
        range(len(ours), config.num_ranks),
    )
    numeric, _ = listener.address
    children = ChildStarter(
        command, {**route_of(numeric), **os.environ, **environment}, len(ours), reserved_cores
    )
    meeting = meeting_point(numeric, free_port(numeric))
    return HostsStarter(children, len(ours), JoinedRanks(listener), meeting)


def _over_ray(
    config: EngineConfig, model_dir: Path, command: Sequence[str], environment: Mapping[str, str]
) -> Starter:
    try:
        from fastserve.executor.ray_ranks import RayStarter
    except ModuleNotFoundError as error:
        raise ConfigError(
            "--distributed-executor-backend ray: Ray is not installed: pip install "
            "'fastserve[ray]', on every host"
        ) from error
    return RayStarter(
        config,
        model_dir,
        num_gpus=int(choose_device(config.device).type == "cuda"),
        command=command,
        environment=environment,
    )
