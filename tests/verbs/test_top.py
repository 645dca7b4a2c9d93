"""`fastserve top` reads what the server's metrics really say."""

from __future__ import annotations

import dataclasses
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from rich.console import Console

from fastserve import cli
from fastserve.client.metrics import EngineMetrics
from fastserve.core.messages import SchedulerStats
from fastserve.verbs.top import Snapshot, picture, rate, read_snapshot
from fastserve.wire.engine_messages import EngineInfo, EngineStats
from fastserve.wire.step_sizes import StepSizes

STATS = SchedulerStats(
    num_running=3,
    num_waiting=4,
    num_preempted=1,
    requests_by_level={0: 2, 3: 5, 11: 1},
    device_blocks_total=100,
    device_blocks_free=30,
    device_blocks_cached=20,
    device_blocks_used=50,
    host_blocks_total=0,
    host_blocks_used=0,
    num_steps=10,
    num_preemptions=6,
    num_demotions=7,
    num_promotions=8,
    num_recomputed_tokens=0,
    num_computed_prompt_tokens=0,
    num_cached_prompt_tokens=0,
    num_dropped_samples=0,
    num_stalls=0,
)


INFO = EngineInfo(
    model="demo",
    max_model_len=2048,
    max_request_tokens=1600,
    vocab_size=9,
    block_size=16,
    num_device_blocks=100,
    eos_token_ids=frozenset(),
    dtype="float32",
    device="cpu",
    sampling_defaults={},
)


def exposition(num_generated=0, *, is_loaded=True, **changes):
    """Return what /metrics of an engine in this state says."""
    metrics = EngineMetrics("demo")
    if is_loaded:
        metrics.loaded(INFO)
    metrics.snapshot(
        EngineStats(
            scheduler=dataclasses.replace(STATS, **changes),
            num_requests=8,
            steps_by_tokens=StepSizes().counts,
            step_tokens=0,
            scheduler_s=0.5,
            device_s=1.0,
            at=0.0,
        )
    )
    metrics.generated(num_generated)
    return metrics.render()[0].decode()


@contextmanager
def server_that_says(text, status=200, date=None):
    """Answer every GET with this."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response_only(status)
            self.send_header("Date", date or self.date_time_string())
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_snapshot_of_real_metrics():
    """Every figure is found under the name that the metrics module gives it."""
    now = read_snapshot(exposition(num_generated=99), at=1.0)
    assert (now.running, now.waiting) == (3, 5)  # who was preempted waits
    assert (now.model_name, now.is_loaded) == ("demo", True)
    assert now.started_at == pytest.approx(time.time(), abs=60.0)
    assert now.by_level == {0: 2, 3: 5, 11: 1}
    assert now.blocks["device", "used"] == 50
    assert sum(count for (tier, _), count in now.blocks.items() if tier == "device") == 100
    assert now.totals["generation_tokens_total"] == 99
    for name, value in (("num_preemptions", 6), ("demotions", 7), ("engine_steps", 10)):
        assert now.totals[f"{name}_total"] == value
    assert "prompt_tokens_total" in now.totals
    assert "scheduler_step_seconds_total" in now.totals


def test_rates_are_differences():
    """Tokens a second are those between two looks; one look tells no rate."""
    before = Snapshot(at=1.0, totals={"x_total": 10.0})
    now = Snapshot(at=3.0, totals={"x_total": 40.0})
    assert rate(before, now, "x_total") == 15.0
    assert rate(None, now, "x_total") is None
    assert rate(now, now, "x_total") is None


def drawn(width, **changes):
    """Return the lines of one picture, in a terminal of so many columns."""
    console = Console(width=width)
    now = read_snapshot(exposition(**changes), at=0.0)
    with console.capture() as capture:
        console.print(picture("http://x", None, now, uptime_s=3725.9, width=width))
    return capture.get().splitlines()


def test_picture_shows_levels_in_order():
    """Levels come in the order in which they run, 11 after 3, with their counts."""
    lines = [line.split() for line in drawn(100)]
    levels = [(line[0], line[1]) for line in lines if len(line) > 1 and line[0] in {"0", "3", "11"}]
    assert levels == [("0", "2"), ("3", "5"), ("11", "1")]
    assert ["device", "used", "50"] in [line[:3] for line in lines]


def test_picture_names_the_model_and_its_uptime():
    """What is watched, and since when it runs."""
    assert [line.rstrip() for line in drawn(100)[:3]] == [
        "fastserve top  http://x",
        "model demo",
        "up 1:02:05",
    ]


@pytest.mark.parametrize("width", [100, 80, 64, 63, 40, 32])
def test_picture_fits_the_terminal(width):
    """Every figure keeps its name and its number in one line, however narrow it is."""
    lines = [line.rstrip() for line in drawn(width, device_blocks_free=1_000_000)]
    assert max(map(len, lines)) <= width
    words = " ".join(" ".join(line.split()) for line in lines)
    for text in (
        "preemptions/s -",
        "ms to decide a step -",
        "demotions 7",
        "device free 1,000,000",
    ):
        assert text in words
    assert "…" not in words


def test_a_server_that_loads_is_shown_as_such():
    """It has a name and an uptime, and figures only when the model is there."""
    lines = [line.rstrip() for line in drawn(80, is_loaded=False)]
    assert lines[1:] == ["model demo", "up 1:02:05", "", "the model is loading"]


def test_uptime_is_by_the_server_s_clock(capsys):
    """A clock of this machine that is wrong does not matter."""
    started = 1_700_000_000
    date = format_datetime(datetime.fromtimestamp(started + 90_061, UTC), usegmt=True)
    text = f'fastserve:start_time_seconds{{model_name="m"}} {started}\n'
    rest = "".join(line + "\n" for line in exposition().splitlines() if "start_time" not in line)
    with server_that_says(rest + text, date=date) as url:
        assert cli.main(["top", url, "--once"]) == 0
    assert "up 1 day, 1:01:01" in capsys.readouterr().out


def test_pictures_in_a_pipe_follow_each_other(capsys, monkeypatch):
    """No control characters; a server that goes away meanwhile is a line, and may come back."""
    answers = [httpx.Response(200, text=exposition()), httpx.ConnectError("refused")] * 2
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def answer(self, url):
        if not answers:
            raise KeyboardInterrupt
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(httpx.Client, "get", answer)
    assert cli.main(["top"]) == 130
    said = capsys.readouterr().out
    assert said.count("fastserve top  http://127.0.0.1:8000") == 2
    assert said.count("refused; still trying\n") == 2
    assert "\x1b" not in said


def test_once_prints_one_picture(capsys):
    """`top --once` is for scripts and screenshots."""
    with server_that_says(exposition()) as url:
        assert cli.main(["top", url, "--once"]) == 0
    assert "requests by level" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("nothing", 404, "answers 404"),
        ("# HELP x y\n# TYPE x gauge\nx 1\n", 200, "not the metrics of a FastServe server"),
        ("{<html>}", 200, "these are not"),
        ("", 401, "answers 401 Unauthorized"),
        ("fastserve:num_requests_running 1\n", 200, "these are not"),
        ("fastserve:num_requests_running NaN\n", 200, "these are not"),
        ("fastserve:requests_by_level 1\n", 200, "these are not"),
    ],
)
def test_a_server_of_another_kind(capsys, text, status, words):
    """Whatever else listens there, the complaint is one line."""
    with server_that_says(text, status) as url:
        assert cli.main(["top", url, "--once"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://[::1", "ftp://127.0.0.1", "http://", "a b"])
def test_a_server_that_is_not_there(capsys, url):
    """One line, whether nobody answers or the address is none."""
    assert cli.main(["top", url]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("fastserve: error: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
