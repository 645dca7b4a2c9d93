"""A FastServe server in its own process, for as long as a `with` block lasts.

Must not know: what is measured.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, NamedTuple

READY_SECONDS = 300.0
STOP_SECONDS = 30.0


class LiveServer(NamedTuple):
    """A server that is ready."""

    host: str
    port: int
    pid: int  # of the API process


@contextmanager
def live_server(flags: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Run `fastserve serve` with these flags and yield its address once it is ready.

    Raises RuntimeError with the end of its log when it ends or does not become ready.
    """
    with live_process(flags) as server:
        yield server.host, server.port


@contextmanager
def live_process(flags: Sequence[str]) -> Iterator[LiveServer]:
    """Do as `live_server`, and say which process it is."""
    host, port = "127.0.0.1", free_port()
    command = [sys.executable, "-m", "fastserve", "serve", "--host", host, "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, *flags], stdout=log, stderr=subprocess.STDOUT)
        try:
            await_ready(process, f"http://{host}:{port}/ready", log)
            yield LiveServer(host, port, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def await_ready(process: subprocess.Popen[bytes], url: str, log: IO[str]) -> None:
    """Ask until the server says that it is ready."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)  # another process: there is nothing to wait on but the answer
    log.seek(0)
    raise RuntimeError(f"the server did not become ready:\n{log.read()[-2000:]}")
