"""Starts the ranks of a distributed model; behind it children and other hosts are alike.

Rules: a rank is a process on a socket; who starts it says where it runs, and how it ended. `start`
is called once for each rank, on a thread that lives as long as the rank does. Must not know: what
is said on the socket, what a rank computes.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import Protocol

from fastserve.wire.child import reap, spawn
from fastserve.wire.rank_messages import Place

HOST = "localhost"


class StartedRank(Protocol):
    """A rank that was started."""

    @property
    def connection(self) -> socket.socket:
        """What it hears and says; the driver closes it."""

    @property
    def place(self) -> Place:
        """Where it runs."""

    def kill(self) -> None:
        """End it at once, as far as this is in the driver's power."""

    def end(self) -> str:
        """Wait a bounded time until it is gone, its connection being over; say how it died."""


class Starter(Protocol):
    """Starts the ranks of one model."""

    @property
    def rendezvous(self) -> str:
        """Where the ranks meet: a URL of torch.distributed's."""

    def start(self, rank: int) -> StartedRank:
        """Start a rank and return it once its connection is there; raises where it is not."""

    def close(self) -> None:
        """Let go of what was needed while the ranks ran; ranks that have not come will not."""


class ChildRank:
    """Fits `StartedRank`: a child process."""

    def __init__(
        self, process: subprocess.Popen[bytes], connection: socket.socket, place: Place
    ) -> None:
        self.process = process
        self.connection = connection
        self.place = place

    def kill(self) -> None:
        self.process.kill()

    def end(self) -> str:
        status = reap(self.process)
        return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


class ChildStarter:
    """Fits `Starter`: all ranks are children on this host, and speak over its loopback device.

    They meet in a file of Linux's that has no name, so that nothing is left of it however this
    process ends; whoever may read this process' memory may open it, and nobody else.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        num_ranks: int,
        reserved_cores: int,
    ) -> None:
        """`command` starts a rank; the number of an inherited socket is appended."""
        self._command = tuple(command)
        self._num_ranks = num_ranks
        self._reserved_cores = reserved_cores
        # gloo would listen on the address of this host's name, which others may reach.
        self._environment = {"GLOO_SOCKET_IFNAME": "lo", **environment}
        self._meeting = os.fdopen(os.memfd_create("fastserve-ranks"), "rb")
        self.rendezvous = f"file:///proc/{os.getpid()}/fd/{self._meeting.fileno()}"

    def start(self, rank: int) -> ChildRank:
        process, connection = spawn(self._command, self._environment)
        place = Place(
            host=HOST,
            local_rank=rank,
            num_local_ranks=self._num_ranks,
            reserved_cores=self._reserved_cores,
        )
        return ChildRank(process, connection, place)

    def close(self) -> None:
        self._meeting.close()
