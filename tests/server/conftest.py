"""A live server for the tests that need one: a process of its own, started once for all of them."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

API_KEY = "sk-test"
OTHER_KEY = "sk-other"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave alone slow tests that take seconds to be collected only, where none of them runs."""
    is_slow = collection_path.name == "test_schemathesis_at_length.py"
    return True if is_slow and config.option.markexpr == "not slow" else None


@contextlib.contextmanager
def serving(*flags: str, model: str = "demo") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `fastserve serve` on a free port; yield it and its address."""
    command = [
        sys.executable, "-m", "fastserve", "serve", model, "--port", "0", "--num-threads", "1",
        "--api-key", API_KEY, *flags,
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            found = re.search(r"Serving .* on (http://\S+)", line)
            if found:
                break
        else:
            pytest.fail("the server did not start:\n" + "".join(lines))
        # Unread, a full pipe would stop the server.
        drain = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
        drain.start()
        yield process, found.group(1)
        process.terminate()
        assert process.wait(60) == 0, "".join(lines)
        drain.join(10)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """The address of a live server that the tests share."""
    with serving("--max-body-bytes", "200000", "--api-key", API_KEY, OTHER_KEY) as (_, url):
        yield url


@pytest.fixture(scope="session")
def client(server_url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client, pointed at the live server."""
    with openai.OpenAI(base_url=server_url + "/v1", api_key=API_KEY, max_retries=0) as made:
        yield made
