"""Starts the ranks of several hosts: some are children of this one, the others join over TCP.

Rules: those that join are waited for together, while the children start: none is a rank before all
are there. A rank of another host ends with its connection, which its own host sees to.
Must not know: who starts what joins, what is said on a connection once a rank has joined.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from fastserve.executor.starting import ChildStarter, StartedRank
from fastserve.wire.joining import JOIN_TIMEOUT_S, JoinError, Listener, Peer
from fastserve.wire.rank_messages import Place


class JoinedRank:
    """Fits `StartedRank`: a process of another host, or one that another parent started."""

    def __init__(self, peer: Peer, num_local_ranks: int) -> None:
        self.connection = peer.connection
        self.place = Place(
            host=peer.host,
            local_rank=peer.hello.local_rank,
            num_local_ranks=num_local_ranks,
            model_dir=peer.hello.model_dir,
        )

    def kill(self) -> None:
        with contextlib.suppress(OSError):  # it has ended already
            self.connection.shutdown(socket.SHUT_RDWR)

    def end(self) -> str:
        return "its connection ended"


class JoinedRanks:
    """Ranks that join a listener, waited for from when this is made."""

    def __init__(self, listener: Listener, check: Callable[[], None] = lambda: None) -> None:
        """`check` ends the wait by raising, when it is known that not all will come."""
        self._is_closing = threading.Event()
        self._check = check
        pool = ThreadPoolExecutor(1, "joining")
        self._peers: Future[dict[int, Peer]] = pool.submit(
            listener.gather, JOIN_TIMEOUT_S, self._check_all
        )
        pool.shutdown(wait=False)

    def peer(self, rank: int) -> Peer:
        """Wait for a rank, and return it. Raises JoinError or TermsError if not all came."""
        return self._peers.result()[rank]

    def take(self, rank: int) -> tuple[Peer, int]:
        """Wait for a rank; return it, and how many ranks that joined share its host."""
        peer = self.peer(rank)
        return peer, sum(peer.address == each.address for each in self._peers.result().values())

    def close(self) -> None:
        """Wait for no more of them."""
        self._is_closing.set()

    def _check_all(self) -> None:
        if self._is_closing.is_set():
            raise JoinError("the engine has ended")
        self._check()


class HostsStarter:
    """Fits `Starter`: the first ranks are children of this host, which is the first one."""

    def __init__(
        self, children: ChildStarter, num_children: int, joined: JoinedRanks, rendezvous: str
    ) -> None:
        self.rendezvous = rendezvous
        self._children = children
        self._num_children = num_children
        self._joined = joined

    def start(self, rank: int) -> StartedRank:
        if rank < self._num_children:
            return self._children.start(rank)
        return JoinedRank(*self._joined.take(rank))

    def close(self) -> None:
        self._joined.close()
        self._children.close()


def meeting_point(host: str, port: int) -> str:
    """Return the URL by which torch.distributed's ranks meet at an address of the first one."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
