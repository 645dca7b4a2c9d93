"""Attacks on a live server: bounded in memory and time, and its neighbours notice nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from benchmarks.neighbours import Seen
from tests.server.conftest import API_KEY, serving
from tests.server.neighbours import watching

pytestmark = pytest.mark.processes

MIB = 2**20
P99_S = 0.5  # of /health under attack; other tests use the machine at the same time


class Target(NamedTuple):
    """A server under attack."""

    process: subprocess.Popen[str]
    url: str

    def connect(self) -> socket.socket:
        """Return a new connection."""
        address = urlsplit(self.url)
        assert address.hostname is not None
        assert address.port is not None
        return socket.create_connection((address.hostname, address.port), timeout=60)

    def post(self, path: str, body: bytes) -> int:
        """Return the status of an answer; 0 where the connection ends without one."""
        headers = {"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"}
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        with contextlib.closing(connection), contextlib.suppress(ConnectionError):
            connection.request("POST", path, body, headers)
            return connection.getresponse().status
        return 0

    def rss_bytes(self) -> int:
        """Return the memory that the API process holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        [kib] = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")]
        return int(kib) * 1024

    @contextlib.contextmanager
    def growing_at_most(self, num_bytes: int) -> Iterator[None]:
        """Assert that the memory never exceeds what it is now by more than so many bytes."""
        before = peak = self.rss_bytes()
        is_over = threading.Event()

        def sample() -> None:
            nonlocal peak
            while not is_over.wait(0.01):
                peak = max(peak, self.rss_bytes())

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            yield
        finally:
            is_over.set()
            sampler.join()
        assert peak - before < num_bytes

    @contextlib.contextmanager
    def bounded(self, num_bytes: int) -> Iterator[Seen]:
        """Attack within: memory is bounded, and neighbours are served as ever."""
        with watching(self.url, API_KEY, p99_s=P99_S) as seen, self.growing_at_most(num_bytes):
            yield seen


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    """A server of this module's own, with the limits that servers have."""
    with serving() as (process, url):
        yield Target(process, url)


@pytest.mark.parametrize(
    ("start", "filler"),
    [
        (b"GET /health HTTP/1.1\r\nX: ", b"a" * 2**16),
        (b"GET /health HTTP/1.1\r\n", b"a: b\r\n" * 2**13),
    ],
)
def test_headers_without_end(target: Target, start: bytes, filler: bytes) -> None:
    """128 MiB of them, from someone without a key."""
    num_sent = 0
    with target.bounded(16 * MIB), target.connect() as connection:
        connection.sendall(start)
        with contextlib.suppress(ConnectionError):
            while num_sent < 128 * MIB:
                connection.sendall(filler)
                num_sent += len(filler)
    assert num_sent < 16 * MIB


def post(target: Target, body: dict[str, Any]) -> tuple[int, Any, float]:
    """POST a completion; return the status, the answer and the seconds that it took."""
    began = time.perf_counter()
    with contextlib.closing(target.connect()) as connection, connection.makefile("rb") as stream:
        content = json.dumps({"max_tokens": 1, **body}).encode()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nAuthorization: Bearer " + API_KEY.encode()
            + b"\r\nContent-Length: %d\r\n\r\n" % len(content) + content
        )  # fmt: skip
        status = int(stream.readline().split()[1])
        while stream.readline() != b"\r\n":
            pass
        return status, json.loads(stream.read()), time.perf_counter() - began


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "n": 2048, "user": "u" * 4_000_000}, "user"),
        ({"prompt": "x", "n": 512, "stop_token_ids": [5] * 130_000}, "stop_token_ids"),
        ({"prompt": [5] * 2000, "n": 128, "prompt_logprobs": 20}, "n"),
        ({"prompt": "x", "n": 2048, "metadata": {"a": "x" * 4_000_000}}, "metadata"),
        ({"prompt": [[5]] * 2049}, "prompt"),
        ({"prompt": "x", "priority": -100}, "priority"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_requests_that_ask_for_too_much(target: Target, body: dict[str, Any], param: str) -> None:
    """Refused before anything is made of them, by the name of what is too much."""
    with target.bounded(64 * MIB):
        status, answer, spent_s = post(target, body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert spent_s < 5.0


def test_many_choices_of_a_scored_prompt(target: Target) -> None:
    """Twenty alternatives to each of 1,000 tokens, eight times: scored and held once."""
    body = {"prompt": [5 + n % 900 for n in range(1000)], "n": 8, "prompt_logprobs": 20}
    with target.bounded(64 * MIB):
        status, answer, _ = post(target, body)
    assert status == 200
    scores = [choice["prompt_logprobs"] for choice in answer["choices"]]
    assert len(scores) == 8
    assert all(each == scores[0] for each in scores)
    assert [len(ranked) >= 20 for ranked in scores[0][1:]] == [True] * 999


MANY = {
    "lists": ("/v1/completions", b'{"prompt": [', b"[5],", b"[5]]}"),
    "messages": ("/v1/chat/completions", b'{"messages": [', b'{"role":"","content":""},', b"{}]}"),
    "ids": ("/detokenize", b'{"tokens": [', b"5,", b"5]}"),
}


@pytest.mark.parametrize("kind", MANY)
def test_bodies_of_many_values(target: Target, kind: str) -> None:
    """As many as the largest body holds: refused before an object is made of them."""
    path, start, item, end = MANY[kind]
    body = start + item * (4 * MIB // len(item) - 10) + end
    with target.bounded(64 * MIB):
        statuses = [target.post(path, body) for _ in range(3)]
    assert statuses == [413] * 3


def test_a_text_longer_than_any_prompt(target: Target) -> None:
    """It is refused without a look at it."""
    body = b'{"prompt": "' + b"word " * (4 * MIB // 5 - 10) + b'"}'
    with target.bounded(64 * MIB):
        statuses = [target.post("/v1/completions", body) for _ in range(3)]
    assert statuses == [400] * 3


def test_bodies_that_stall(target: Target) -> None:
    """60 of them, each a byte short of the largest; what they hold together is bounded."""
    length = 4 * MIB
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {API_KEY}\r\nContent-Length: {length}\r\n\r\n"
    )
    with target.bounded(120 * MIB), contextlib.ExitStack() as opened:
        for _ in range(60):
            connection = opened.enter_context(target.connect())
            connection.sendall(head.encode() + b" " * (length - 1))
