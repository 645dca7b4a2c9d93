"""A FastServe server in its own process, for as long as a `with` block lasts.

Rules: a server may be given a cache directory of its own, so that nothing another one learned from
its requests reaches it. Must not know: what is measured.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from huggingface_hub.constants import HF_HOME

READY_SECONDS = 300.0
STOP_SECONDS = 30.0


class LiveServer(NamedTuple):
    """A server that is ready."""

    host: str
    port: int
    process: subprocess.Popen[bytes]  # the API process

    @property
    def pid(self) -> int:
        """The number of the API process."""
        return self.process.pid

    @property
    def url(self) -> str:
        """The address without a path."""
        return f"http://{self.host}:{self.port}"


@contextmanager
def copied_cache(warm: Path) -> Iterator[Path]:
    """Yield a copy of a cache directory, deleted with whatever was written to it."""
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(warm, directory, dirs_exist_ok=True)
        yield Path(directory)


@contextmanager
def live_process(
    flags: Sequence[str],
    cache_home: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[LiveServer]:
    """Run `fastserve serve` with these flags and yield it once it is ready.

    `variables` are added to its environment. `cache_home` stands for the user's ~/.cache;
    downloaded models stay where they are. Raises RuntimeError with the end of its log when it ends
    or does not become ready.
    """
    host, port = "127.0.0.1", free_port()
    command = [sys.executable, "-m", "fastserve", "serve", "--host", host, "--port", str(port)]
    environment = {**os.environ, **(variables or {})}
    if cache_home is not None:
        environment |= {"XDG_CACHE_HOME": str(cache_home), "HF_HOME": HF_HOME}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, *flags], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            await_ready(process, f"http://{host}:{port}/ready", log)
            yield LiveServer(host, port, process)
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
