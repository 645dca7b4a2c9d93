"""Who is let in before a server ends is answered, whatever it had sent by then."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import pytest
import uvicorn

from fastserve.client.async_engine import AsyncEngine
from fastserve.server.connection import BoundedConnection, ConnectionLimits
from fastserve.server.last_clients import has_unread, shut_door
from fastserve.server.listen import SignalledServer, address, bind
from tests.server.scripted import ScriptedEngine, make_app

PATIENCE_S = 20.0
LAST_S = 0.4  # for the request of a connection that is new
BODY = b'{"prompt": "x", "max_tokens": 2}'
REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
)
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Answered(NamedTuple):
    """What a client was told last."""

    status: int
    code: str | None
    is_closed: bool  # after it


SHUTTING_DOWN = Answered(503, "shutting_down", True)


class Server(SignalledServer):
    """One that runs in a thread, where there are no signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle none."""
        yield


class Ending(NamedTuple):
    """A server, where it listens, and what ends it."""

    listener: socket.socket
    place: tuple[str, int]
    end: Callable[[], None]
    ended: Callable[[], bool]

    def connect(self) -> socket.socket:
        """Return a new connection."""
        return socket.create_connection(self.place, PATIENCE_S)

    def wait_until_alone(self) -> None:
        """Wait until nobody else is let in, and the connections there are have been told."""
        deadline = time.monotonic() + PATIENCE_S
        while self.listener.fileno() >= 0:
            assert time.monotonic() < deadline
            time.sleep(0.005)


@contextlib.contextmanager
def serving(graceful_s: int = 5) -> Iterator[Ending]:
    """Run a server until its `end`, or the end of the context."""
    limits = ConnectionLimits(num_connections=1000, last_s=LAST_S)
    app = make_app(ScriptedEngine())
    config = uvicorn.Config(
        app,
        http=cast(Any, partial(BoundedConnection, limits=limits)),
        ws="none",
        lifespan="off",
        log_config=None,
        timeout_graceful_shutdown=graceful_s,
    )
    server = Server(config, cast(AsyncEngine, None), lambda: None, 0.0)
    with bind("127.0.0.1", 0) as listener:
        place = address(listener)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()

        def end() -> None:
            app.state.context.is_draining = True
            server.should_exit = True

        def ended() -> bool:
            thread.join(PATIENCE_S)
            return not thread.is_alive()

        try:
            yield Ending(listener, place, end, ended)
        finally:
            end()
            assert ended()


def answer(connection: socket.socket) -> Answered:
    """Read one answer, and see whether the connection ends behind it."""
    with connection.makefile("rb") as stream:
        status = int(stream.readline().split()[1])
        headers = dict(iter(lambda: header(stream.readline()), ("", "")))
        body = stream.read(int(headers["content-length"]))
        code = json.loads(body)["error"]["code"] if status != 200 and body else None
        is_closed = headers.get("connection") == "close" and not stream.read()
    return Answered(status, code, is_closed)


def header(line: bytes) -> tuple[str, str]:
    """Return a header's lower-case name, and its value."""
    name, _, value = line.decode().partition(":")
    return name.strip().lower(), value.strip()


@pytest.mark.parametrize("sent", [0, 1, 60, len(REQUEST) - 1, len(REQUEST)])
def test_a_request_that_is_there_in_part_is_answered(sent: int) -> None:
    """The rest of it comes once nobody else is let in: none of it, or a byte, or the head."""
    with serving() as ending, ending.connect() as connection:
        connection.sendall(REQUEST[:sent])
        ending.end()
        ending.wait_until_alone()
        connection.sendall(REQUEST[sent:])
        assert answer(connection) == SHUTTING_DOWN
        assert ending.ended()


@pytest.mark.parametrize("sent", [1, 60])
def test_a_head_that_does_not_come_is_not_waited_for(sent: int) -> None:
    """Who has begun one is told; the server ends soon."""
    with serving() as ending, ending.connect() as connection:
        connection.sendall(REQUEST[:sent])
        ending.end()
        assert answer(connection) == SHUTTING_DOWN


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    """As long as for the last bytes of answers; then its client is told."""
    with serving(graceful_s=1) as ending, ending.connect() as connection:
        connection.sendall(REQUEST[:-1])
        ending.end()
        assert answer(connection) == SHUTTING_DOWN
        assert ending.ended()


def test_connections_without_a_request_end() -> None:
    """One that had its answers at once, one that is new after its little time."""
    with serving(graceful_s=60) as ending, ending.connect() as used, ending.connect() as new:
        used.sendall(HEALTH)
        assert answer(used) == (200, None, False)
        ending.end()
        for connection in (used, new):
            assert connection.recv(1) == b""
        assert ending.ended()


def test_the_last_answer_of_a_connection_says_so() -> None:
    """However well it went: the connection ends."""
    with serving(graceful_s=60) as ending, ending.connect() as connection:
        ending.end()
        ending.wait_until_alone()
        connection.sendall(HEALTH)
        assert answer(connection) == (200, None, True)


def test_whoever_is_let_in_is_answered() -> None:
    """Clients come one upon the other while the server ends: each has its answer, or is refused."""
    outcomes: list[Answered | str] = []
    has_begun = threading.Barrier(5)

    def come(ending: Ending) -> None:
        for number in range(100_000):
            try:
                connection = ending.connect()
            except ConnectionRefusedError:
                outcomes.append("refused")
                return
            with connection:
                try:
                    connection.sendall(REQUEST)
                    outcomes.append(answer(connection))
                except (OSError, IndexError) as error:
                    outcomes.append(repr(error))
            if number == 3:
                has_begun.wait(PATIENCE_S)

    with serving() as ending:
        clients = [threading.Thread(target=come, args=(ending,)) for _ in range(4)]
        for client in clients:
            client.start()
        has_begun.wait(PATIENCE_S)
        ending.end()
        for client in clients:
            client.join(PATIENCE_S)
    counts = Counter(outcomes)
    assert counts.pop("refused") == 4
    assert counts[SHUTTING_DOWN] > 0
    assert set(counts) <= {SHUTTING_DOWN, Answered(200, None, False)}


@pytest.mark.skipif(sys.platform != "linux", reason="the filter is Linux's")
def test_a_door_that_is_shut_keeps_who_is_inside() -> None:
    """Those who wait are accepted; who knocks is let in no more, and refused in the end."""
    with bind("127.0.0.1", 0) as listener:
        place = address(listener)
        waiting = [socket.create_connection(place) for _ in range(3)]
        shut_door(listener)
        with pytest.raises(TimeoutError):
            socket.create_connection(place, 0.05)
        for one in waiting:
            one.sendall(b"x")
            assert has_unread(listener.fileno())
            taken, _ = listener.accept()
            with one, taken:
                assert taken.recv(1) == b"x"
                taken.sendall(b"y")
                assert one.recv(1) == b"y"
        assert not has_unread(listener.fileno())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(place)
