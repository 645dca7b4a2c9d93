"""Connections over real sockets: what a client may send, hold and leave undone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import pytest
import uvicorn

from fastserve.server.bodies import Bodies
from fastserve.server.connection import (
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_LINE_BYTES,
    MAX_PIPELINED,
    BoundedConnection,
    ConnectionLimits,
)
from fastserve.server.listen import address, bind, num_connections
from tests.server.scripted import ScriptedEngine, make_app, says

TINY_S = 0.2  # a limit that a test waits out
LONG_S = 30.0  # one that it must not
KERNEL_BYTES = 2**13  # what the kernel may hold of an answer, so that little is written in vain
BODY = json.dumps({"prompt": "x", "stream": True}).encode()


@contextlib.contextmanager
def serving(
    engine: ScriptedEngine | None = None,
    *,
    keep_alive_s: float = LONG_S,
    bodies: Bodies | None = None,
    **limits: Any,
) -> Iterator[Callable[..., socket.socket]]:
    """Serve an app over a scripted engine with these limits; yields what connects to it."""
    chosen = ConnectionLimits(
        **{"num_connections": 100, "head_s": LONG_S, "write_s": LONG_S, **limits}
    )
    app = make_app(engine or ScriptedEngine())
    if bodies is not None:
        app.state.context.bodies = bodies
    config = uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], partial(BoundedConnection, limits=chosen)),
        ws="none",
        lifespan="off",
        log_config=None,
        timeout_keep_alive=cast(int, keep_alive_s),
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    with bind("127.0.0.1", 0) as listener, contextlib.ExitStack() as opened:
        thread = threading.Thread(target=server.run, args=([listener],))
        place = address(listener)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)
        listener.listen()
        thread.start()

        def connect(receive_bytes: int = 2**16) -> socket.socket:
            made = opened.enter_context(socket.socket())
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            made.settimeout(LONG_S)
            made.connect(place)
            return made

        try:
            yield connect
        finally:
            opened.close()
            server.should_exit = True
            thread.join(LONG_S)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def connect() -> Iterator[Callable[..., socket.socket]]:
    """Connects to a server whose times are too long for a test to see."""
    with serving() as made:
        yield made


def request(method: str = "GET", path: str = "/health", *headers: str, body: bytes = b"") -> bytes:
    """Return the bytes of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    if body:
        lines += [f"Content-Length: {len(body)}", "Content-Type: application/json"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def post(*headers: str) -> bytes:
    """Return the bytes of a request for a stream."""
    return request("POST", "/v1/completions", *headers, body=BODY)


def status_of(connection: socket.socket) -> int:
    """Return the status of the answer that comes; 0 if the connection is closed without one."""
    with contextlib.suppress(ConnectionError):
        line = connection.recv(12, socket.MSG_WAITALL)
        return int(line.split()[1]) if line else 0
    return 0


def closes_within(connection: socket.socket, limit_s: float) -> bool:
    """Read on until the connection is closed."""
    connection.settimeout(limit_s)
    try:
        while connection.recv(2**16):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def send_until_closed(connection: socket.socket, start: bytes, filler: bytes) -> int:
    """Send more and more, until nothing is taken any more; return how much of it went out."""
    connection.sendall(start)
    num_bytes = 0
    with contextlib.suppress(ConnectionError):
        while num_bytes < 2**26:
            connection.sendall(filler)
            num_bytes += len(filler)
    return num_bytes


CHUNKED = b"POST /detokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
FLOODS = {
    "method": (b"", b"G" * 2**16),
    "target": (b"GET /", b"a" * 2**16),
    "name of a header": (b"GET / HTTP/1.1\r\n", b"a" * 2**16),
    "value of a header": (b"GET / HTTP/1.1\r\nX: ", b"a" * 2**16),
    "many headers": (b"GET / HTTP/1.1\r\n", b"a: b\r\n" * 2**13),
    "trailer": (CHUNKED + b"0\r\nX: ", b"a" * 2**16),
    "many trailers": (CHUNKED + b"0\r\n", b"a: b\r\n" * 2**13),
    "extension of a chunk": (CHUNKED + b"2;", b"a" * 2**16),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_no_part_of_a_head_is_endless(connect, kind: str) -> None:
    """The connection is closed after what the buffers of two sockets hold, and others go on."""
    began = time.monotonic()
    num_bytes = send_until_closed(connect(), *FLOODS[kind])
    assert num_bytes < 2**24
    assert time.monotonic() - began < 5.0
    other = connect()
    other.sendall(request())
    assert status_of(other) == 200


@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        (["X: " + "a" * (MAX_LINE_BYTES - 1)], "/health", 200),
        (["X: " + "a" * MAX_LINE_BYTES], "/health", 431),
        ([f"X{i}: " + "a" * (MAX_HEADER_BYTES // 5) for i in range(4)], "/health", 200),
        ([f"X{i}: " + "a" * (MAX_HEADER_BYTES // 5) for i in range(5)], "/health", 431),
        (["a: b"] * (MAX_HEADERS - 1), "/health", 200),
        (["a: b"] * MAX_HEADERS, "/health", 431),
        ([], "/" + "a" * (MAX_LINE_BYTES - 1), 404),
        ([], "/" + "a" * MAX_LINE_BYTES, 414),
        (["no header"], "/health", 400),
    ],
)
@pytest.mark.parametrize("num_at_once", [2**20, 1000])
def test_the_size_of_a_head(connect, headers, path, status, num_at_once) -> None:
    """Exact, however it is cut into packets; refusals have the shape of all others."""
    connection = connect()
    content = request("GET", path, *headers)
    with contextlib.suppress(ConnectionError):
        for start in range(0, len(content), num_at_once):
            connection.sendall(content[start : start + num_at_once])
    answer = b""
    with contextlib.suppress(ConnectionError):
        while not answer.endswith(b"}") and (more := connection.recv(2**16)):
            answer += more
            if status == 200:
                break
    assert answer.split()[1] == str(status).encode()
    if status != 200:
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("start", "status"), [(b"", 0), (b"GET / HT", 408), (request()[:-2] + b"X: y", 408)]
)
def test_a_head_must_come_in_time(start: bytes, status: int) -> None:
    """A connection without a request is closed; one that has begun a request is told."""
    with serving(head_s=TINY_S) as connect:
        connection = connect()
        connection.sendall(start)
        assert status_of(connection) == status
        assert closes_within(connection, 5.0)


@pytest.mark.parametrize("drop", [b"\r\n", b"a"])
def test_drops_do_not_lengthen_the_time(drop: bytes) -> None:
    """Of a head that comes byte by byte, and of an idle connection that sends empty lines."""
    with serving(head_s=3 * TINY_S, keep_alive_s=TINY_S) as connect:
        connection = connect()
        connection.sendall(request())
        assert status_of(connection) == 200
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 5.0:
                connection.sendall(drop)
                time.sleep(TINY_S / 8)
        assert time.monotonic() - began < 2.5


def test_a_body_that_nobody_reads_ends_in_time() -> None:
    """The answer came before it: what is left of the body may not keep the connection."""
    with serving(head_s=TINY_S) as connect:
        connection = connect()
        connection.sendall(request("POST", "/nowhere", "Content-Length: 1000000"))
        assert status_of(connection) == 404
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 5.0:
                connection.sendall(b"x" * 1000)
                time.sleep(TINY_S / 8)
        assert time.monotonic() - began < 2.5


def test_an_idle_connection_has_its_own_time() -> None:
    """Between requests it is --timeout-keep-alive that counts, not the time of a head."""
    with serving(head_s=TINY_S) as connect:
        connection = connect()
        for _ in range(2):
            connection.sendall(request())
            assert status_of(connection) == 200
            assert not closes_within(connection, 3 * TINY_S)


def test_an_answer_may_take_longer_than_a_head() -> None:
    """Even with a part of the next request behind it."""
    engine = ScriptedEngine(says("ok", ends=None))
    with serving(engine, head_s=TINY_S) as connect:
        connection = connect()
        connection.sendall(post() + b"GET /hea")
        assert status_of(connection) == 200
        assert not closes_within(connection, 4 * TINY_S)
        assert not engine.streams[0].is_aborted


def test_a_client_that_reads_nothing_is_cut_off() -> None:
    """Its request is aborted, and the memory is bounded by what is written at once."""
    engine = ScriptedEngine(says("ab" * 2000, ends=None))
    with serving(engine, write_s=TINY_S) as connect:
        connection = connect(KERNEL_BYTES)
        connection.sendall(post())
        assert until(lambda: engine.streams and engine.streams[0].is_aborted)


def test_a_client_that_reads_slowly_is_served() -> None:
    """It takes some bytes in every span of time."""
    engine = ScriptedEngine(says("ab" * 2000))
    with serving(engine, write_s=2 * TINY_S) as connect:
        connection = connect(KERNEL_BYTES)
        connection.sendall(post("Connection: close"))
        received = b""
        while more := connection.recv(2**15):
            received += more
            time.sleep(TINY_S / 20)
        assert b"data: [DONE]\n\n" in received


def test_an_answer_that_is_not_taken_does_not_keep_a_closed_connection() -> None:
    """All of it is written and the connection closing, so that nothing else would end it."""
    engine = ScriptedEngine(says("ab" * 50_000, per_update=100_000))
    with serving(engine, write_s=TINY_S, num_connections=1) as connect:
        connection = connect(KERNEL_BYTES)
        body = json.dumps({"prompt": "x", "max_tokens": 99}).encode()
        connection.sendall(request("POST", "/v1/completions", "Connection: close", body=body))

        def is_free() -> bool:
            other = connect()
            other.sendall(request())
            return status_of(other) == 200

        assert not is_free()
        assert until(is_free)


def test_there_are_only_so_many_connections() -> None:
    """Those beyond are told so and closed; once one has gone another may come."""
    with serving(num_connections=3) as connect:
        held = [connect() for _ in range(3)]
        for connection in held:
            connection.sendall(request())
            assert status_of(connection) == 200
        beyond = connect()
        assert status_of(beyond) == 503
        assert closes_within(beyond, 5.0)
        held.pop().close()

        def is_taken() -> bool:
            connection = connect()
            with contextlib.suppress(ConnectionError):
                connection.sendall(request())
            return status_of(connection) == 200

        assert until(is_taken)


def test_some_files_are_left_to_others() -> None:
    """An engine that is started again, a log: whatever the limit is."""
    assert [num_connections(limit) for limit in (256, 20_000, 2**20)] == [192, 16_384, 16_384]


def test_only_so_many_requests_are_pipelined() -> None:
    """Each costs memory before anybody looks at it."""
    with serving(ScriptedEngine(says("ok", ends=None))) as connect:
        connection = connect()
        connection.sendall(post() + request() * (MAX_PIPELINED + 1))
        assert status_of(connection) in (0, 200)
        assert closes_within(connection, 5.0)


def test_pipelined_requests_are_answered_in_order(connect) -> None:
    """As many as are taken."""
    connection = connect()
    connection.sendall(request() * MAX_PIPELINED + request("GET", "/x", "Connection: close"))
    received = b""
    while more := connection.recv(2**16):
        received += more
    statuses = [line.split()[1] for line in received.splitlines() if line.startswith(b"HTTP/")]
    assert statuses == [b"200"] * MAX_PIPELINED + [b"404"]


def test_a_stream_ends_with_its_client_though_more_was_pipelined() -> None:
    """The connection knows which request it is answering."""
    engine = ScriptedEngine(says("ok", ends=None))
    with serving(engine) as connect:
        connection = connect()
        connection.sendall(post() + request())
        assert status_of(connection) == 200
        connection.close()
        assert until(lambda: engine.streams[0].is_aborted)


def until(condition: Callable[[], Any], limit_s: float = 10.0) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
