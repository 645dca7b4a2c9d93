"""Starts ranks as Ray's actors, one a rank: Ray places, starts and watches them.

    a stage ─► one bundle of as many devices as it has shards, on one host; stages spread over hosts
    a rank  ─► an actor in its stage's bundle ─► a process, which joins the engine over TCP

Rules: Ray is told numbers and words, and carries neither plans nor tensors. Where a stage fits no
host, its shards are packed on as few as they can be. An actor that ends before its rank has joined
ends the wait, with its own words. Must not know: what a rank does.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fastserve.checkpoint.locate import locate
from fastserve.executor.host_ranks import HostRanks
from fastserve.executor.joined_ranks import JoinedRank, JoinedRanks, meeting_point
from fastserve.executor.layout import Layout
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.wire.child import EXIT_GRACE_S
from fastserve.wire.cluster_secret import ClusterSecret
from fastserve.wire.joining import JoinError, Listener, Peer
from fastserve.wire.terms import terms

PLACE_TIMEOUT_S = 30.0

logger = logging.getLogger(__name__)


class RankActor:
    """A rank on the host where Ray has placed it; it ends with its process."""

    def run(
        self,
        rank: int,
        address: tuple[str, int],
        secret: str,
        settings: bytes,
        command: Sequence[str],
        environment: Mapping[str, str],
    ) -> int:
        """Join and run one rank; return the exit status of its process."""
        config = msgspec.msgpack.decode(settings, type=EngineConfig)
        model_dir = locate(config.model, config.revision)
        host = HostRanks(
            address=address,
            secret=ClusterSecret(secret.encode()),
            terms=terms(config, model_dir),
            model_dir=str(model_dir),
            command=command,
            environment=environment,
        )
        return host.run({0: rank})  # Ray shows each actor its own device only


class RayRank(JoinedRank):
    """Fits `StartedRank`: how it ended, Ray knows."""

    def __init__(self, peer: Peer, num_local_ranks: int, run: Any) -> None:
        super().__init__(peer, num_local_ranks)
        self._run = run

    def end(self) -> str:
        try:
            return _describe(ray.get(self._run, timeout=EXIT_GRACE_S))
        except ray.exceptions.GetTimeoutError:
            return super().end()
        except ray.exceptions.RayError as error:
            return _one_line(error)


class RayStarter:
    """Fits `Starter`: all ranks are where Ray has room for them."""

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        *,
        num_gpus: int,  # that each rank takes: 1, or 0 on CPUs
        command: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        """Place the ranks and wait for them elsewhere.

        Raises ConfigError where no Ray runs, or it has no room.
        """
        layout = Layout.of(config)
        secret = ClusterSecret.read(config.cluster_secret_file) or ClusterSecret.draw()
        self._is_connected_here = _connect(environment)
        listener = Listener(
            config.master_addr or ray.util.get_node_ip_address(),
            config.master_port or 0,
            secret,
            terms(config, model_dir),
            range(layout.num_ranks),
        )
        try:
            self._group, bundles = _place(layout, num_gpus)
        except ConfigError:
            listener.close()
            raise
        remote = ray.remote(RankActor)
        self._actors = [
            remote.options(
                num_cpus=1,
                num_gpus=num_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=bundle
                ),
            ).remote()
            for bundle in bundles
        ]
        if Path(config.model).expanduser().resolve() == model_dir:  # actors start elsewhere
            config = dataclasses.replace(config, model=str(model_dir))
        settings = msgspec.msgpack.encode(config)
        self._runs = [
            actor.run.remote(
                rank, listener.address, secret.reveal(), settings, command, dict(environment)
            )
            for rank, actor in enumerate(self._actors)
        ]
        self._joined = JoinedRanks(listener, self._check)

    @property
    def rendezvous(self) -> str:
        """Where the ranks meet: at the first one's host, wherever that is."""
        first = self._joined.peer(0)
        return meeting_point(first.address, first.hello.meeting_port)

    def start(self, rank: int) -> RayRank:
        peer, num_local_ranks = self._joined.take(rank)
        return RayRank(peer, num_local_ranks, self._runs[rank])

    def close(self) -> None:
        self._joined.close()
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._group)
        if self._is_connected_here:
            ray.shutdown()

    def _check(self) -> None:
        """Raise JoinError for a rank that ended before all had joined."""
        ended, _ = ray.wait(self._runs, num_returns=len(self._runs), timeout=0)
        for run in ended:
            rank = self._runs.index(run)
            try:
                how = _describe(ray.get(run))
            except ray.exceptions.RayError as error:
                how = _one_line(error)
            raise JoinError(f"rank {rank} ended before all had joined: {how}")


def _connect(environment: Mapping[str, str]) -> bool:
    """Connect to the cluster of this host, unless this process is; whether it was not."""
    if ray.is_initialized():
        return False
    path = environment.get("PYTHONPATH")
    try:
        ray.init(
            address="auto",
            logging_level=logging.WARNING,
            runtime_env={"env_vars": {"PYTHONPATH": path}} if path else None,
        )
    except ConnectionError as error:
        raise ConfigError(
            "--distributed-executor-backend ray: no Ray runs here; `ray start` comes first"
        ) from error
    return True


def _place(layout: Layout, num_gpus: int) -> tuple[PlacementGroup, list[int]]:
    """Return a group with room for all ranks, and the bundle of each.

    Raises ConfigError where there is none within PLACE_TIMEOUT_S.
    """
    of_rank = {"CPU": 1.0, "GPU": float(num_gpus)} if num_gpus else {"CPU": 1.0}
    num_shards, ranks = layout.tensor_parallel_size, range(layout.num_ranks)
    of_stage = {name: number * num_shards for name, number in of_rank.items()}
    if any(_has(node["Resources"], of_stage) for node in ray.nodes() if node["Alive"]):
        bundles, strategy = [of_stage] * layout.pipeline_parallel_size, "SPREAD"
        bundle_of = [layout.stage_of(rank) for rank in ranks]
    else:
        logger.warning("no host has %s, so that a stage has to span hosts", _listed(of_stage))
        bundles, strategy, bundle_of = [of_rank] * len(ranks), "PACK", list(ranks)
    group = placement_group(bundles, strategy=strategy)
    if not group.wait(PLACE_TIMEOUT_S):
        remove_placement_group(group)
        raise ConfigError(
            f"--distributed-executor-backend ray: no room within {PLACE_TIMEOUT_S:g} s for "
            f"{len(bundles)} times {_listed(of_rank if strategy == 'PACK' else of_stage)}; "
            f"free in the cluster: {_listed(ray.available_resources())}"
        )
    return group, bundle_of


def _has(resources: Mapping[str, float], needed: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0.0) >= number for name, number in needed.items())


def _listed(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))


def _describe(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def _one_line(error: Exception) -> str:
    """Return what an actor said of its end, without the way that led there."""
    cause = getattr(error, "cause", None) or error
    return " ".join(str(cause).split())
