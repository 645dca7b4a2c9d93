"""How a server ends: what its clients hear, how long it takes, and with which status."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from fastserve.server.listen import LAST_BYTES_S, address, bind
from fastserve.settings.option import ConfigError
from fastserve.wire.child import EXIT_GRACE_S
from tests.server.paced_server import Answers, Paced, serving

EXIT_S = 5.0  # within which a server is gone that has nothing more to wait for
LONG = 2000  # tokens: some seconds


def run(server: Paced, body: Callable[[Answers], Awaitable[None]]) -> None:
    """Run a coroutine function with requests of a server, and with a time limit."""

    async def limited() -> None:
        limits = httpx.Limits(max_connections=None)
        async with (
            asyncio.timeout(60),
            httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client,
        ):
            await body(Answers(client))

    asyncio.run(limited())


def engine_of(server: Paced) -> int:
    """Return the engine process of a server."""
    pid = server.process.pid
    (engine,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(engine)


@pytest.mark.processes
@pytest.mark.parametrize("grace_s", ["0", "600"])
def test_what_is_cut_off_is_told_so(grace_s: str) -> None:
    """At the limit: an error event and [DONE] in each stream, a 503 for others, status 143."""
    flags = ("--shutdown-timeout", "0.5", "--stream-grace", grace_s)
    with serving("paced", *flags) as server:

        async def body(answers: Answers) -> None:
            answers.open(20, stream=True, max_tokens=LONG)
            answers.open(5, max_tokens=LONG)
            answers.open(3, stream=True, max_tokens=5)
            await answers.until(lambda: answers.num_events > 100)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("SIGTERM: finishing")
            answers.open(2, max_tokens=5)
            ends = await answers.ends()
            assert ends.pop("whole") >= 3
            assert ends == Counter({"error shutting_down": 20, "503 shutting_down": 7}), (
                "none breaks off, and none is told twice"
            )

        run(server, body)
        assert server.process.wait(EXIT_S) == 128 + signal.SIGTERM


@pytest.mark.processes
def test_a_signal_ends_a_server_whose_engine_hangs() -> None:
    """It is stopped, and does not read what it is sent: more than its socket holds."""
    with serving("paced", "--shutdown-timeout", "0.2") as server:

        async def body(answers: Answers) -> None:
            answers.open(1, stream=True, max_tokens=LONG)
            await answers.until(lambda: answers.num_events > 5)
            os.kill(engine_of(server), signal.SIGSTOP)
            prompt = list(range(50_000, 51_900))
            answers.open(200, prompt=prompt, stream=True, max_tokens=5)
            await answers.until(lambda: answers.num_accepted == 201)
            server.process.send_signal(signal.SIGTERM)
            assert await answers.ends() == {"error shutting_down": 201}

        run(server, body)
        assert server.process.wait(EXIT_GRACE_S + EXIT_S) == 128 + signal.SIGTERM


@pytest.mark.processes
@pytest.mark.parametrize("flags", [(), pytest.param(("-dp", "2"), marks=pytest.mark.slow)])
def test_a_server_ends_with_its_last_engine(flags: tuple[str, ...]) -> None:
    """After as many deaths as are allowed: each stream is told, and the status is 1, soon."""
    with serving("failing", *flags) as server:

        async def body(answers: Answers) -> None:
            answers.open(10, stream=True, max_tokens=LONG)
            answers.open(2, max_tokens=LONG)
            ends = await answers.ends()
            assert ends == {"error engine_dead": 10, "503 engine_dead": 2}

        run(server, body)
        ended_at = time.monotonic()
        server.wait_for("^fastserve: error: the device fell off the bus$")
        assert server.process.wait(EXIT_S) == 1
        assert time.monotonic() - ended_at < EXIT_S


@pytest.mark.processes
def test_a_log_that_nobody_reads_holds_nothing_up() -> None:
    """Its pipe is full: requests are answered as before, and the server ends as it is told."""
    with serving("paced") as server:
        assert server.process.stderr is not None
        fcntl.fcntl(server.process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        with httpx.Client(base_url=server.url, timeout=30) as client:
            for _ in range(200):  # of some 60 bytes each
                assert client.get("/v1/models").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(EXIT_S) == 0


@pytest.mark.processes
@pytest.mark.slow
def test_a_client_that_takes_nothing_does_not_hold_the_end_up() -> None:
    """Its answer is cut off after the time for last bytes, and the status says so."""
    body = b'{"prompt": [1], "max_tokens": 2000, "stream": true, "return_token_ids": true}'
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    with serving("paced", "--shutdown-timeout", "0.5") as server:
        port = int(server.url.rpartition(":")[2])
        with socket.socket() as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.connect(("127.0.0.1", port))
            stalled.sendall(head + body)
            assert stalled.recv(15) == b"HTTP/1.1 200 OK"
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(LAST_BYTES_S + 2 * EXIT_S) == 128 + signal.SIGTERM


def test_one_of_two_servers_on_a_port_says_so_at_once() -> None:
    """However close they come: exactly one has the port, and the other names it."""
    with closing(bind("127.0.0.1", 0)) as free:
        port = address(free)[1]
    for _ in range(50):
        start = threading.Barrier(2)
        outcomes: list[object] = []

        def compete(start: threading.Barrier = start, seen: list[object] = outcomes) -> None:
            start.wait()
            try:
                seen.append(bind("127.0.0.1", port))
            except ConfigError as error:
                seen.append(str(error))

        rivals = [threading.Thread(target=compete) for _ in range(2)]
        for rival in rivals:
            rival.start()
        for rival in rivals:
            rival.join()
        (refusal,) = [outcome for outcome in outcomes if isinstance(outcome, str)]
        (listener,) = [outcome for outcome in outcomes if not isinstance(outcome, str)]
        listener.close()  # type: ignore[attr-defined]
        assert f"127.0.0.1 port {port}" in refusal
