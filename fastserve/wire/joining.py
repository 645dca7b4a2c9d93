"""Joining over TCP: the engine listens on one address, and a rank of another host connects to it.

Rules: ranks are welcome together, once all are there: whichever reason keeps one out, all are told
the same line. A peer that does not know the secret keeps nobody out: it is cut off, and noted. One
that knows it and differs in what has to be equal ends the wait at once. All is over within a time
limit. Must not know: what a rank does, what has to be equal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping

from fastserve.settings.option import ConfigError
from fastserve.wire import handshake
from fastserve.wire.cluster_secret import ClusterSecret
from fastserve.wire.frames import encode_frame
from fastserve.wire.handshake import (
    HandshakeError,
    Hello,
    Refused,
    RefusedError,
    Welcome,
    differences,
)
from fastserve.wire.links import LINK_TIMEOUT_S, converse, has_ended, listen, prepare

JOIN_TIMEOUT_S = 30.0
HANDSHAKE_TIMEOUT_S = 5.0  # up to the Hello: nothing is computed in between
RETRY_S = 0.2  # between attempts to reach an engine that does not listen yet
CHECK_S = 1.0
LAST_WORDS_S = 1.0  # for those who are still saying Hello when all are refused
MAX_CONVERSATIONS = 64  # at once, with peers that have not joined
MAX_NOTED = 5  # refusals that one line can hold
NOTHING_SAID = Hello()

logger = logging.getLogger(__name__)


class JoinError(Exception):
    """Ranks and engine did not come together; one line says which, and why."""


class TermsError(ConfigError):
    """Hosts differ in what has to be equal; one line says where."""


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection; `hello` is what it said, unless there is a `reason` why not.

    `address` is its host's, as this host sees it.
    """

    connection: socket.socket
    address: str
    hello: Hello = NOTHING_SAID
    reason: str = ""

    @property
    def host(self) -> str:
        """Its host by name and address."""
        return f"{ascii(self.hello.host)[1:-1]} at {self.address}"

    def __str__(self) -> str:
        return self.address if self.reason else f"rank {self.hello.rank} on {self.host}"


class Listener:
    """Listens for ranks from when it is made until they are gathered, or it is closed."""

    def __init__(
        self,
        host: str,
        port: int,  # 0 picks a free one
        secret: ClusterSecret,
        terms: Mapping[str, str],
        ranks: Collection[int],
    ) -> None:
        self._listening = listen(host, port)
        self._secret = secret
        self._terms = terms
        self._ranks = frozenset(ranks)
        self._joined: dict[int, Peer] = {}
        self._notes: list[str] = []
        self._conversations: dict[socket.socket, threading.Thread] = {}
        self._heard: queue.SimpleQueue[Peer] = queue.SimpleQueue()
        self._bell, self._ringer = socket.socketpair()  # a byte for each that was heard

    @property
    def address(self) -> tuple[str, int]:
        """The address and the port that ranks connect to."""
        host, port = self._listening.getsockname()[:2]
        return host, port

    def gather(
        self, timeout_s: float = JOIN_TIMEOUT_S, check: Callable[[], None] = lambda: None
    ) -> dict[int, Peer]:
        """Wait until all ranks have joined, stop listening, and return them by number.

        `check` is called every second, and ends the wait by raising. Raises JoinError for ranks
        that did not come, TermsError for one that differs; those that came are told.
        """
        try:
            self._wait(timeout_s, check)
        except Exception as error:
            self._refuse_all(" ".join(str(error).split()))
            raise
        finally:
            self.close()
        for peer in self._joined.values():
            _answer(peer, Welcome())
        return self._joined

    def close(self) -> None:
        """Stop listening, and cut off those that have not joined."""
        self._listening.close()
        for connection, thread in self._conversations.items():
            with contextlib.suppress(OSError):  # it has ended already
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()
            connection.close()
        self._conversations.clear()
        self._bell.close()
        self._ringer.close()

    def _wait(self, timeout_s: float, check: Callable[[], None]) -> None:
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._listening, selectors.EVENT_READ, self._accept)
            selector.register(self._bell, selectors.EVENT_READ, self._take)
            while len(self._joined) < len(self._ranks):
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0:
                    raise JoinError(self._what_is_missing(timeout_s))
                for source, _ in selector.select(min(CHECK_S, remaining_s)):
                    source.data()
                check()

    def _accept(self) -> None:
        connection, (address, *_) = self._listening.accept()
        if len(self._conversations) == MAX_CONVERSATIONS:
            connection.close()
            return
        thread = threading.Thread(
            target=self._hear, args=(connection, address), name="joining", daemon=True
        )
        self._conversations[connection] = thread
        thread.start()

    def _hear(self, connection: socket.socket, address: str) -> None:
        """Hear one peer out, on a thread of its own."""
        try:
            prepare(connection)
            deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
            hello = converse(connection, handshake.hear(self._secret), deadline)
            peer = Peer(connection, address, hello)
        except (HandshakeError, OSError) as error:
            peer = Peer(connection, address, reason=str(error) or type(error).__name__)
        self._heard.put(peer)
        self._ringer.send(b"\0")

    def _take(self) -> None:
        """Let a peer that was heard join if it may; TermsError for one that differs."""
        self._bell.recv(1)
        peer = self._heard.get()
        self._conversations.pop(peer.connection).join()
        if peer.reason:
            self._turn_away(peer, peer.reason)
            return
        difference = differences(peer.hello.terms, self._terms)
        if not difference and (reason := self._why_not(peer.hello.rank)):
            _answer(peer, Refused(f"{peer} cannot join: {reason}"))
            self._turn_away(peer, reason)
            return
        self._joined[peer.hello.rank] = peer
        if difference:
            raise TermsError(f"{peer} differs from the engine: {difference}")

    def _refuse_all(self, reason: str) -> None:
        """Tell those that have joined, and those that are about to."""
        deadline = time.monotonic() + LAST_WORDS_S
        for thread in self._conversations.values():
            thread.join(max(deadline - time.monotonic(), 0.0))
        heard = [self._heard.get() for _ in range(self._heard.qsize())]
        for peer in (*self._joined.values(), *heard):
            if not peer.reason:
                _answer(peer, Refused(reason))
            peer.connection.close()

    def _why_not(self, rank: int) -> str:
        if rank not in self._ranks:
            return f"the ranks to join are {_listed(self._ranks)}"
        earlier = self._joined.get(rank)
        if earlier is None:
            return ""
        if not has_ended(earlier.connection):
            return f"it has joined already, from {earlier.address}"
        earlier.connection.close()  # it was started again
        return ""

    def _turn_away(self, peer: Peer, reason: str) -> None:
        peer.connection.close()
        logger.warning("%s did not join: %s", peer, reason)
        self._notes.append(f"{peer}: {reason}")

    def _what_is_missing(self, timeout_s: float) -> str:
        missing = _listed(self._ranks - self._joined.keys())
        line = f"rank {missing} did not join within {timeout_s:g} s"
        notes = "; ".join(self._notes[-MAX_NOTED:])
        return f"{line}; meanwhile {notes}" if notes else line


def join(
    address: tuple[str, int],
    secret: ClusterSecret,
    hello: Hello,
    timeout_s: float = JOIN_TIMEOUT_S,
    given_up: threading.Event | None = None,
) -> socket.socket:
    """Connect to an engine, which may not listen yet, and return the connection once all have.

    Raises JoinError where it is not reached in time, or refuses, or where it was not yet reached
    when it was given up.
    """
    given_up = given_up or threading.Event()
    where = f"{address[0]}:{address[1]}"
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return _join(address, secret, hello, deadline)
        except RefusedError as error:
            raise JoinError(str(error)) from error
        except HandshakeError as error:
            raise JoinError(f"rank {hello.rank} cannot join {where}: {error}") from error
        except OSError as error:  # it does not listen yet, or its engine has just ended
            is_late = time.monotonic() + RETRY_S >= deadline
            if is_late or given_up.wait(RETRY_S):  # nothing tells when a host begins to listen
                reason = error.strerror or error
                raise JoinError(
                    f"rank {hello.rank} did not reach {where} within {timeout_s:g} s: {reason}"
                ) from error


def _join(
    address: tuple[str, int], secret: ClusterSecret, hello: Hello, deadline: float
) -> socket.socket:
    remaining_s = max(deadline - time.monotonic(), RETRY_S)
    connection = socket.create_connection(address, min(remaining_s, LINK_TIMEOUT_S))
    try:
        prepare(connection)
        converse(connection, handshake.introduce(secret, hello), deadline)
        # The engine waits for the other ranks, and may have begun to when this one came.
        converse(connection, handshake.await_answer(), time.monotonic() + JOIN_TIMEOUT_S)
    except BaseException:
        connection.close()
        raise
    return connection


def _answer(peer: Peer, answer: Welcome | Refused) -> None:
    """Tell a peer what became of its wish; who uses the connection finds out if it has ended."""
    with contextlib.suppress(OSError):
        peer.connection.sendall(encode_frame(answer))


def _listed(ranks: Collection[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
