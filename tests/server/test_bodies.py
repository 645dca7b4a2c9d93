"""Bodies that do not come, come in masses, or end before they do."""

from __future__ import annotations

import json
import logging
import socket
import time
from functools import partial

from fastserve.server.bodies import Bodies
from tests.server.scripted import ScriptedEngine
from tests.server.test_connection import TINY_S, closes_within, request, serving, status_of, until

LARGEST = 2**16
WHOLE = json.dumps({"prompt": "x"}).encode()


def begun(num_bytes: int) -> bytes:
    """Return the beginning of a request with so many bytes of a body of twice as many."""
    length = f"Content-Length: {2 * num_bytes}"
    kind = "Content-Type: application/json"
    return request("POST", "/v1/completions", length, kind) + b" " * num_bytes


def holds(bodies: Bodies, num_bytes: int) -> bool:
    """Whether so much is held."""
    return bodies.num_bytes == num_bytes


def is_served(connection: socket.socket) -> bool:
    """Ask for an answer."""
    connection.sendall(request("POST", "/v1/completions", body=WHOLE))
    return status_of(connection) == 200


def test_a_body_that_stalls_is_given_up() -> None:
    """408 and the connection is closed; it counts no more."""
    bodies = Bodies(LARGEST, stall_s=TINY_S)
    with serving(bodies=bodies) as connect:
        connection = connect()
        connection.sendall(begun(1000))
        assert status_of(connection) == 408
        assert closes_within(connection, 5.0)
        assert until(lambda: bodies.num_bytes == 0)


def test_a_body_may_come_slowly() -> None:
    """It may take longer than the time without a byte."""
    engine = ScriptedEngine()
    with serving(engine, bodies=Bodies(LARGEST, stall_s=2 * TINY_S)) as connect:
        connection = connect()
        connection.sendall(request("POST", "/v1/completions", body=WHOLE)[: -len(WHOLE)])
        for start in range(0, len(WHOLE), 3):
            connection.sendall(WHOLE[start : start + 3])
            time.sleep(TINY_S / 2)
        assert status_of(connection) == 200


def test_the_oldest_body_ends_where_all_are_too_much() -> None:
    """Those that came later, and others, are served; what is held stays within the bound."""
    bodies = Bodies(LARGEST)
    with serving(bodies=bodies) as connect:
        stalled = [connect() for _ in range(6)]
        for number, connection in enumerate(stalled):
            connection.sendall(begun(LARGEST // 3))
            held = min(number + 1, 3) * (LARGEST // 3)
            assert until(partial(holds, bodies, held))
        assert [status_of(connection) for connection in stalled[:3]] == [503] * 3
        assert is_served(connect())
        stalled[-1].sendall(b" " * (LARGEST // 3))
        assert status_of(stalled[-1]) == 400  # it was whole, and only blanks


def test_a_client_that_leaves_is_no_failure(caplog) -> None:
    """In the middle of its body: a line of the log, and nothing is held."""
    bodies = Bodies(LARGEST)
    with caplog.at_level(logging.INFO), serving(bodies=bodies) as connect:
        connection = connect()
        connection.sendall(begun(1000))
        assert until(lambda: bodies.num_bytes == 1000)
        connection.close()
        assert until(lambda: bodies.num_bytes == 0)
        assert is_served(connect())
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert " 499 " in caplog.text
