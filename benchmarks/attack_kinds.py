"""What one client may do to a server, by name: each an attack that can be repeated.

Rules: an attack is sent over and over by a few clients at once; it says how each try ended, which
is the status of an answer, or what became of the connection. Bodies are as large as a server with
default limits reads, or take as much as it allows one request to take. Must not know: what it does
to anybody.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.live_server import LiveServer

MIB = 2**20
TIMEOUT_S = 120.0
BODY_BYTES = 4 * MIB - 64  # almost the largest that is read
PIECE = 2**16
HOLD_S = 0.5
LOOP = "loop"  # what makes TEMPLATE loop
TEMPLATE = (
    "{% set text = messages[-1].content %}"
    f"{{% if text == '{LOOP}' %}}"
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{% else %}<|user|>{{ text }}<|assistant|>{% endif %}"
)


class Attack(NamedTuple):
    """What each of some clients does again and again; returns how a try ended."""

    once: Callable[[LiveServer], str]
    num_clients: int = 2


def connected(server: LiveServer) -> socket.socket:
    """Return a new connection."""
    return socket.create_connection((server.host, server.port), TIMEOUT_S)


def post(path: str, body: bytes | dict[str, Any]) -> Callable[[LiveServer], str]:
    """Return what sends a body and reads the whole answer."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    def once(server: LiveServer) -> str:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=TIMEOUT_S)
        with contextlib.closing(connection):
            try:
                connection.request("POST", path, content, {"Content-Type": "application/json"})
                response = connection.getresponse()
                response.read()
            except ConnectionError:
                return "closed"
        return str(response.status)

    return once


def endless(start: bytes, filler: bytes) -> Callable[[LiveServer], str]:
    """Return what sends up to 128 MiB of a head, until nothing is taken any more."""
    filler *= PIECE // len(filler)

    def once(server: LiveServer) -> str:
        with connected(server) as connection:
            try:
                connection.sendall(start)
                for _ in range(128 * MIB // PIECE):
                    connection.sendall(filler)
            except ConnectionError:
                return "closed"
        return "read to the end"

    return once


def filled(start: bytes, item: bytes, end: bytes) -> bytes:
    """Return a body of the largest size with as many items as there is room for."""
    return start + item * ((BODY_BYTES - len(start) - len(end)) // len(item)) + end


def stall(server: LiveServer) -> str:
    """Hold 60 bodies a byte short of the largest."""
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {BODY_BYTES + 1}\r\n\r\n"
    )
    with contextlib.ExitStack() as opened:
        for _ in range(60):
            connection = opened.enter_context(connected(server))
            try:
                connection.sendall(head.encode() + b" " * BODY_BYTES)
            except ConnectionError:
                return "closed"
    return "sent"


def leave_unread(server: LiveServer) -> str:
    """Open 30 long streams, read the head of each and then nothing, and leave."""
    body = {"prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True, "logprobs": 5}
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    with contextlib.ExitStack() as opened:
        connections = []
        for _ in range(30):
            connection = opened.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((server.host, server.port))
            connection.sendall(head.encode() + content)
            connections.append(connection)
        statuses = {connection.recv(12)[-3:].decode() for connection in connections}
    return " ".join(sorted(statuses))


def say_nonsense(server: LiveServer) -> str:
    """Send what is no request, and read the answer."""
    with connected(server) as connection:
        connection.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        return connection.recv(12)[-3:].decode() or "closed"


def hold(server: LiveServer) -> str:
    """Open 500 connections, send the first byte of a request on each, and hold them for a while."""
    with contextlib.ExitStack() as opened:
        for _ in range(500):
            opened.enter_context(connected(server)).sendall(b"G")
        time.sleep(HOLD_S)
    return "held"


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
WORDS = filled(b'{"prompt":"', b"word ", b'"}')
ATTACKS = {
    "a header without end": Attack(endless(b"GET /health HTTP/1.1\r\nX: ", b"a"), 4),
    "headers without end": Attack(endless(b"GET /health HTTP/1.1\r\n", b"a: b\r\n"), 4),
    "no HTTP at all": Attack(say_nonsense, 4),
    "connections that begin": Attack(hold),
    "bodies that stall": Attack(stall, 1),
    "lists": Attack(post(COMPLETIONS, filled(b'{"prompt":[', b"[5],", b"[5]]}"))),
    "messages": Attack(post(CHAT, filled(b'{"messages":[', b'{"role":"","content":""},', b"{}]}"))),
    "ids of a prompt": Attack(post(COMPLETIONS, filled(b'{"prompt":[', b"5,", b"5]}"))),
    "ids": Attack(post("/detokenize", b'{"tokens":[' + b"5," * 2**17 + b"5]}")),
    "a long prompt": Attack(post(COMPLETIONS, WORDS)),
    "a long text": Attack(post("/tokenize", WORDS)),
    "a looping template": Attack(
        post(CHAT, {"messages": [{"role": "user", "content": LOOP}], "max_tokens": 4})
    ),
    "n": Attack(post(COMPLETIONS, {"prompt": "x", "n": 2048, "max_tokens": 4})),
    "n of a long prompt": Attack(
        post(COMPLETIONS, {"prompt": [5 + i % 900 for i in range(2000)], "n": 512, "max_tokens": 8})
    ),
    "stop lists": Attack(
        post(
            COMPLETIONS,
            {
                "prompt": "x",
                "n": 512,
                "max_tokens": 16,
                "stop": [chr(97 + i % 26) * 1000 + str(i) for i in range(64)],
                "stop_token_ids": list(range(300, 556)),
            },
        )
    ),
    "scores": Attack(post(COMPLETIONS, {"prompt": "x", "n": 64, "max_tokens": 64, "logprobs": 20})),
    "scores of a prompt": Attack(
        post(
            COMPLETIONS,
            {
                "prompt": [5 + i % 900 for i in range(1900)],
                "n": 8,
                "max_tokens": 1,
                "prompt_logprobs": 20,
            },
        )
    ),
    "streams that are not read": Attack(leave_unread, 1),
}
