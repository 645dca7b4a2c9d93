"""The listening server: its address, its signals, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import httpx
import pytest

from fastserve.server.listen import address, bind, warn_if_exposed
from fastserve.settings.option import ConfigError
from fastserve.settings.server import ServerConfig
from tests.fresh_cache import make_fresh_cache

FLAGS = ("demo", "--port", "0", "--num-device-blocks", "128", "--num-threads", "1")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a cache directory of this module's own: step times are measured once."""
    return make_fresh_cache(tmp_path_factory.mktemp("cache"))


@contextmanager
def serving(cache: str, flags: Sequence[str] = FLAGS) -> Iterator[subprocess.Popen[str]]:
    """Run `fastserve serve`; killed in the end if it still runs."""
    process = subprocess.Popen(
        (sys.executable, "-m", "fastserve", "serve", *flags),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": cache},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_line(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """Read the log until a line matches."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(pattern, line):
            return found
    raise AssertionError(f"the server ended without a line like {pattern}")


def open_stream(client: httpx.Client, max_tokens: int) -> httpx.Response:
    """Begin a streamed completion."""
    body = {"prompt": "x", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
    return client.send(client.build_request("POST", "/v1/completions", json=body), stream=True)


@pytest.mark.processes
def test_a_signal_lets_answers_end_and_takes_no_new_ones(cache: str) -> None:
    """SIGTERM: new work is 503, what is under way ends whole, and the exit status is 0."""
    with serving(cache) as process:
        base = wait_for_line(process, r"Serving demo on (http://127\.0\.0\.1:\d+)")[1]
        with httpx.Client(base_url=base, timeout=60) as client:
            response = open_stream(client, 300)
            lines = response.iter_lines()
            assert next(lines).startswith("data: {")
            process.send_signal(signal.SIGTERM)
            wait_for_line(process, "SIGTERM: finishing 1 requests")
            refused = client.get("/ready")
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            events = [line.removeprefix("data: ") for line in lines if line]
            assert events[-1] == "[DONE]"
            reasons = [json.loads(event)["choices"][0]["finish_reason"] for event in events[:-1]]
            assert reasons[-1] == "length"
        assert process.wait(30) == 0


@pytest.mark.processes
def test_a_second_signal_ends_at_once(cache: str) -> None:
    """Every stream breaks off, without one traceback, and the status tells of the signal."""
    with serving(cache) as process, contextlib.ExitStack() as opened:
        base = wait_for_line(process, r"Serving demo on (http://127\.0\.0\.1:\d+)")[1]
        client = opened.enter_context(httpx.Client(base_url=base, timeout=60))
        responses = [open_stream(client, 1900) for _ in range(24)]
        streams = [response.iter_lines() for response in responses]
        for response, stream in zip(responses, streams, strict=True):
            next(stream)
            opened.callback(response.close)
        process.send_signal(signal.SIGINT)
        wait_for_line(process, "SIGINT: finishing 24 requests, .*a second signal ends at once")
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=30)
        assert time.monotonic() - began < 10.0  # of a machine that others use too
        assert process.returncode == 130
        lines = [line for line in rest.splitlines() if "POST /v1/completions 200" not in line]
        assert len(lines) == 1
        assert lines[0].endswith("SIGINT again: ending at once, 24 requests unfinished")


@pytest.mark.processes
@pytest.mark.parametrize("line", ["loading demo", "engine: "])
def test_an_interrupt_while_loading_ends_it(cache: str, line: str) -> None:
    """Before anything is imported, or while the engine loads: at once, and no traceback."""
    with serving(cache) as process:
        wait_for_line(process, line)
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=30)
        assert process.returncode in (0, 130)
        assert "Traceback" not in rest


@pytest.mark.processes
def test_an_idle_connection_stays_open_as_long_as_asked(cache: str) -> None:
    """--timeout-keep-alive reaches the server: of one second, it closes soon after."""
    with serving(cache, (*FLAGS, "--timeout-keep-alive", "1")) as process:
        port = int(wait_for_line(process, r"Serving demo on http://127\.0\.0\.1:(\d+)")[1])
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            began = time.monotonic()
            while connection.recv(4096):
                pass
            assert 0.5 < time.monotonic() - began < 4.5


@pytest.mark.processes
def test_what_only_the_engine_finds_out_is_one_line_too(cache: str) -> None:
    """As for any other setting: exit status 2. What else it may be is tested with the engine."""
    flags = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", "128")
    with serving(cache, (*FLAGS, *flags, "--log-level", "error")) as process:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        (line,) = errors.splitlines()
        assert line.startswith("fastserve: error: --max-num-batched-tokens: 128 is below")


def test_a_port_in_use_is_one_line() -> None:
    """The address is named, before anything is loaded."""
    with closing(bind("127.0.0.1", 0)) as first:
        port = address(first)[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1 port {port}"):
            bind("127.0.0.1", port)


def test_a_host_that_is_not_ours_is_one_line() -> None:
    """A name that cannot be resolved is a ConfigError too."""
    with pytest.raises(ConfigError, match="cannot listen"):
        bind("no.such.host.invalid", 0)


@pytest.mark.parametrize(
    ("host", "api_key", "is_warned"),
    [("127.0.0.1", (), False), ("0.0.0.0", (), True), ("0.0.0.0", ("secret",), False)],
)
def test_an_open_door_is_warned_of(
    host: str, api_key: tuple[str, ...], is_warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beyond loopback and without a key: anyone could use the model."""
    with closing(bind(host, 0)) as listener:
        assert isinstance(listener, socket.socket)
        warn_if_exposed(listener, ServerConfig(host=host, api_key=api_key))
    warning = capsys.readouterr().err
    assert ("--api-key" in warning) is is_warned
    assert len(warning.splitlines()) == int(is_warned)
