"""The ranks of one host, for an engine of another: they join it, run, and join again.

    join, each over a connection of its own ─► one process a rank ─► all have ended ─┐
      ▲                                                                              │
      └───────────────────────────── unless they were told to leave ◄────────────────┘

Rules: the connection is handed to the process, which cannot tell it from one to its parent; the
secret stays here. An engine that is started again finds its ranks there; one that does not come
back within the time to join ends this host's part. Must not know: torch, what a rank does.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.wire.cluster_secret import VARIABLE, ClusterSecret
from fastserve.wire.driver_link import LEFT
from fastserve.wire.handshake import Hello
from fastserve.wire.joining import JOIN_TIMEOUT_S, join
from fastserve.wire.links import address_towards, free_port, interface_of
from fastserve.wire.terms import terms

DEFAULT_PORT = 29501
"""At which ranks join host 0; vLLM's."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HostRanks:
    """What the ranks of this host have in common; `command` starts one, with a socket appended."""

    address: tuple[str, int]  # of the engine
    secret: ClusterSecret
    terms: Mapping[str, str]
    model_dir: str
    command: Sequence[str]
    environment: Mapping[str, str]

    def serve(self, ranks: Sequence[int]) -> int:
        """Run ranks until the engine leaves for good, and return the exit status.

        Raises JoinError where it is not reached, or refuses.
        """
        while self.run(dict(enumerate(ranks))) != LEFT:
            logger.warning("the engine has ended; joining the next one")
        logger.info("the engine has left")
        return LEFT

    def run(self, ranks: Mapping[int, int], timeout_s: float = JOIN_TIMEOUT_S) -> int:
        """Join with ranks (by their number among those of this host) and run them to their end.

        Returns LEFT if all were told to leave, else the status of one that was not.
        """
        logger.info("rank %s: joining %s:%d", ", ".join(map(str, ranks.values())), *self.address)
        processes = [self._start(connection) for connection in self._join_all(ranks, timeout_s)]
        logger.info("joined")
        statuses = [process.wait() for process in processes]
        return next((status for status in statuses if status != LEFT), LEFT)

    def _join_all(self, ranks: Mapping[int, int], timeout_s: float) -> list[socket.socket]:
        """Join with all ranks at once, for they are welcome together; with none if one cannot."""
        given_up = threading.Event()
        with ThreadPoolExecutor(len(ranks)) as pool:
            joining = [
                pool.submit(self._join, rank, local_rank, timeout_s, given_up)
                for local_rank, rank in ranks.items()
            ]
            ended, _ = wait(joining, return_when=FIRST_EXCEPTION)
            errors = [error for future in ended if (error := future.exception())]
            if errors:
                given_up.set()
        if not errors:
            return [future.result() for future in joining]
        for future in joining:
            if future.exception() is None:
                future.result().close()
        raise errors[0]

    def _join(
        self, rank: int, local_rank: int, timeout_s: float, given_up: threading.Event
    ) -> socket.socket:
        hello = Hello(
            rank=rank,
            host=socket.gethostname(),
            local_rank=local_rank,
            model_dir=self.model_dir,
            meeting_port=free_port(address_towards(self.address[0])) if rank == 0 else 0,
            terms=dict(self.terms),
        )
        return join(self.address, self.secret, hello, timeout_s, given_up)

    def _start(self, connection: socket.socket) -> subprocess.Popen[bytes]:
        """Start a rank on its connection, which is its own from then on."""
        with connection:
            return subprocess.Popen(
                (*self.command, str(connection.fileno())),
                pass_fds=(connection.fileno(),),
                stdin=subprocess.DEVNULL,
                env={**route_of(connection.getsockname()[0]), **os.environ, **self.environment},
                process_group=0,
            )


def open_host_ranks(
    config: EngineConfig, model_dir: Path, command: Sequence[str], environment: Mapping[str, str]
) -> tuple[HostRanks, Sequence[int]]:
    """Return what this host has of a server over several, and its ranks.

    Raises ConfigError where there is no secret.
    """
    assert config.master_addr is not None, "checked with the settings"
    host = HostRanks(
        address=(config.master_addr, config.master_port or DEFAULT_PORT),
        secret=read_secret(config),
        terms=terms(config, model_dir),
        model_dir=str(model_dir),
        command=command,
        environment=environment,
    )
    return host, local_ranks(config)


def local_ranks(config: EngineConfig) -> range:
    """Return the ranks of this host: neighbours, so that shards of a stage share one."""
    number = config.num_ranks // config.nnodes
    return range(config.node_rank * number, (config.node_rank + 1) * number)


def read_secret(config: EngineConfig) -> ClusterSecret:
    """Return the secret of all hosts; ConfigError where there is none."""
    secret = ClusterSecret.read(config.cluster_secret_file)
    if secret is None:
        raise ConfigError(
            f"--nnodes {config.nnodes}: needs --cluster-secret-file or {VARIABLE}, the same on "
            "every host"
        )
    return secret


def route_of(address: str) -> dict[str, str]:
    """Return the variables by which tensors take the interface of an address of this host.

    None where the address has no interface that can be found: torch then chooses.
    """
    interface = interface_of(address)
    if interface is None:
        return {}
    return {
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # not a warning for each host that has no name
    }
