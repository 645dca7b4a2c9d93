"""Ranks join over TCP: together, once proved and equal; whatever else connects keeps nobody out."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from fastserve.wire import joining
from fastserve.wire.cluster_secret import ClusterSecret
from fastserve.wire.frames import LENGTH
from fastserve.wire.handshake import (
    MAGIC,
    MAX_MESSAGE_BYTES,
    PROLOGUE_BYTES,
    Hello,
    introduce,
)
from fastserve.wire.joining import JoinError, Listener, TermsError, join
from fastserve.wire.links import converse

SECRET = ClusterSecret(b"a secret of these tests")
TERMS = {"version": "1.0", "checkpoint": "ab12", "--max-num-seqs": "64"}

Joining = Future[socket.socket]


class Hosts:
    """One that listens for ranks 1 and 2, and others that join it, all on this one."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.listener = Listener("127.0.0.1", 0, SECRET, TERMS, {1, 2})
        self._pool = pool

    def join(
        self,
        rank: int,
        secret: ClusterSecret = SECRET,
        terms: dict[str, str] = TERMS,
        timeout_s: float = 10.0,
    ) -> Joining:
        """Let a rank join from another thread."""
        hello = Hello(rank=rank, host=f"host-{rank}", terms=terms)
        return self._pool.submit(join, self.listener.address, secret, hello, timeout_s)

    def connect(self) -> socket.socket:
        """Return a bare connection."""
        return socket.create_connection(self.listener.address, 10)

    def gather(self, timeout_s: float = 10.0) -> Future[dict[int, joining.Peer]]:
        """Wait for the ranks in another thread."""
        return self._pool.submit(self.listener.gather, timeout_s)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Hosts whose threads have ended when the test has."""
    with ThreadPoolExecutor() as pool:
        yield Hosts(pool)


def close(*futures: Joining) -> None:
    """Close the connections that came of joining."""
    for future in futures:
        future.result().close()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def test_ranks_join_together_and_their_connections_are_theirs(hosts: Hosts) -> None:
    """None is welcome before all are there; then each connection is theirs, both ways."""
    first = hosts.join(2)
    gathering = hosts.gather()
    wait_until(lambda: 2 in hosts.listener._joined)
    assert not first.done()
    second = hosts.join(1)
    peers = gathering.result()
    assert sorted(peers) == [1, 2]
    assert str(peers[2]) == "rank 2 on host-2 at 127.0.0.1"
    for rank, joined in ((1, second), (2, first)):
        peers[rank].connection.sendall(b"plan")
        assert joined.result().recv(9) == b"plan"
        joined.result().sendall(b"done")
        assert peers[rank].connection.recv(9) == b"done"
        peers[rank].connection.close()
    close(first, second)


def test_a_rank_may_come_before_the_engine_listens() -> None:
    """It tries again until the address is listened on."""
    with socket.socket() as reserved, ThreadPoolExecutor() as pool:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        address: tuple[str, int] = reserved.getsockname()
        early = pool.submit(join, address, SECRET, Hello(rank=1, terms=TERMS), 10.0)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        reserved.close()
        peers = Listener(address[0], address[1], SECRET, TERMS, {1}).gather(10)
        peers[1].connection.close()
        close(early)


def test_a_wrong_secret_keeps_out_its_owner_alone(hosts: Hosts) -> None:
    """It is told so, the engine notes from where it came, and the others join."""
    wrong = hosts.join(1, ClusterSecret.draw())
    gathering = hosts.gather()
    with pytest.raises(JoinError, match=r"^rank 1 cannot join 127.* its cluster secret differs$"):
        wrong.result()
    right = hosts.join(1), hosts.join(2)
    for peer in gathering.result().values():
        peer.connection.close()
    close(*right)
    assert hosts.listener._notes == ["127.0.0.1: its cluster secret differs"]


def test_a_rank_does_not_join_whoever_lacks_the_secret() -> None:
    """An engine that cannot prove itself is given no Hello, though it accepts every proof."""
    with socket.create_server(("127.0.0.1", 0)) as impostor, ThreadPoolExecutor() as pool:
        joining_it = pool.submit(
            join, impostor.getsockname(), SECRET, Hello(rank=1, terms=TERMS), 10.0
        )
        connection, _ = impostor.accept()
        with connection:
            connection.sendall(MAGIC + bytes(32))
            its_proof = b""
            while len(its_proof) < PROLOGUE_BYTES + 32:
                its_proof += connection.recv(99)
            connection.sendall(its_proof[-32:])  # the rank's own, sent back
            with pytest.raises(JoinError, match="its cluster secret differs"):
                joining_it.result()
            assert connection.recv(99) == b""


@pytest.mark.parametrize(
    ("terms", "line"),
    [
        ({**TERMS, "version": "2.0"}, r"version is 2\.0 there, 1\.0 here"),
        ({**TERMS, "checkpoint": "cd34"}, "checkpoint is cd34 there, ab12 here"),
        ({**TERMS, "--max-num-seqs": "8"}, "--max-num-seqs is 8 there, 64 here"),
        ({**TERMS, "--new-flag": "1"}, "--new-flag is 1 there, not given here"),
        ({}, "version is not given there, 1.0 here; checkpoint .*; --max-num-seqs .* 64 here"),
    ],
)
def test_what_differs_is_named_on_every_host(
    hosts: Hosts, terms: dict[str, str], line: str
) -> None:
    """The engine, the rank that differs and the one that had joined all say the same line."""
    good = hosts.join(1)
    gathering = hosts.gather()
    wait_until(lambda: 1 in hosts.listener._joined)
    other = hosts.join(2, terms=terms)
    expected = rf"^rank 2 on host-2 at 127\.0\.0\.1 differs from the engine: {line}$"
    with pytest.raises(TermsError, match=expected):
        gathering.result()
    for rank in (good, other):
        with pytest.raises(JoinError, match=expected):
            rank.result()


def test_more_peers_than_ranks_and_a_second_of_one_are_refused(hosts: Hosts) -> None:
    """Each is told why, and those that were there first are welcome."""
    first = hosts.join(1)
    gathering = hosts.gather()
    wait_until(lambda: 1 in hosts.listener._joined)
    with pytest.raises(JoinError, match=r"rank 1 on .*: it has joined already, from 127\.0\.0\.1$"):
        hosts.join(1).result()
    with pytest.raises(JoinError, match=r"rank 7 on .*: the ranks to join are 1, 2$"):
        hosts.join(7).result()
    second = hosts.join(2)
    for peer in gathering.result().values():
        peer.connection.close()
    close(first, second)


def test_a_rank_that_was_started_again_joins_in_its_own_place(hosts: Hosts) -> None:
    """The connection of the one that ended does not count as its rank."""
    gathering = hosts.gather()
    with hosts.connect() as connection:
        converse(connection, introduce(SECRET, Hello(rank=1, terms=TERMS)), time.monotonic() + 5)
        wait_until(lambda: 1 in hosts.listener._joined)
        ended = hosts.listener._joined[1]
    again = hosts.join(1)
    wait_until(lambda: hosts.listener._joined[1] is not ended)
    second = hosts.join(2)
    peers = gathering.result()
    assert peers[1].connection.getpeername() == again.result().getsockname()
    for peer in peers.values():
        peer.connection.close()
    close(again, second)


def test_silence_and_garbage_keep_nobody_out(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that say nothing, say anything or leave are cut off, and noted."""
    monkeypatch.setattr(joining, "HANDSHAKE_TIMEOUT_S", 0.2)
    silent, garbage, leaver = hosts.connect(), hosts.connect(), hosts.connect()
    garbage.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" + bytes(99))
    leaver.close()
    gathering = hosts.gather()
    wait_until(lambda: len(hosts.listener._notes) == 3)
    ranks = hosts.join(1), hosts.join(2)
    for peer in gathering.result().values():
        peer.connection.close()
    close(*ranks)
    for connection in (silent, garbage):
        with connection, contextlib.suppress(ConnectionResetError):
            while connection.recv(4096):  # its prologue, then the end
                pass
    assert sorted(hosts.listener._notes) == [
        "127.0.0.1: it closed the connection",
        "127.0.0.1: it fell silent",
        "127.0.0.1: it speaks another protocol",
    ]


def test_ranks_that_do_not_come_are_named(hosts: Hosts) -> None:
    """The line has the time that was waited and who was refused; the one that came is told it."""
    came = hosts.join(1)
    stranger = hosts.connect()
    stranger.sendall(bytes(PROLOGUE_BYTES))
    line = r"^rank 2 did not join within 0\.5 s; meanwhile 127.*: it speaks another protocol$"
    with pytest.raises(JoinError, match=line):
        hosts.gather(0.5).result()
    with pytest.raises(JoinError, match=line):
        came.result()
    stranger.close()


def test_an_engine_that_is_not_there_is_named() -> None:
    """A rank gives up after its time, and says whom it did not reach."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        host, port = reserved.getsockname()
        line = rf"^rank 3 did not reach {host}:{port} within 0\.3 s: Connection refused$"
        with pytest.raises(JoinError, match=line):
            join((host, port), SECRET, Hello(rank=3), 0.3)


def test_the_wait_ends_when_its_check_says_so(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is found out elsewhere, such as a rank that failed to start, is told to those there."""
    monkeypatch.setattr(joining, "CHECK_S", 0.01)
    came = hosts.join(1)

    def check() -> None:
        if 1 in hosts.listener._joined:
            raise RuntimeError("rank 2 did not start")

    with pytest.raises(RuntimeError, match="rank 2 did not start"):
        hosts.listener.gather(10, check)
    with pytest.raises(JoinError, match=r"^rank 2 did not start$"):
        came.result()


def test_a_proved_peer_cannot_make_the_engine_hold_much(hosts: Hosts) -> None:
    """A message is refused for its length before it is read."""
    with hosts.connect() as connection:
        gathering = hosts.gather(5)
        theirs = connection.recv(PROLOGUE_BYTES, socket.MSG_WAITALL)
        ours = MAGIC + bytes(32)
        connection.sendall(ours + SECRET.prove(b"rank", theirs + ours))
        connection.recv(32, socket.MSG_WAITALL)
        connection.sendall(LENGTH.pack(MAX_MESSAGE_BYTES + 1))
        assert connection.recv(9) == b""
    ranks = hosts.join(1), hosts.join(2)
    for peer in gathering.result().values():
        peer.connection.close()
    close(*ranks)
    assert hosts.listener._notes == ["127.0.0.1: a message of 65537 bytes; 65536 at most"]
