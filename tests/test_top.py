"""`fastserve top` reads what the server's metrics really say."""

from __future__ import annotations

import dataclasses
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from rich.console import Console

from fastserve import cli
from fastserve.core.output import SchedulerStats
from fastserve.engine.messages import EngineStats
from fastserve.engine.metrics import EngineMetrics
from fastserve.top import Snapshot, picture, rate, read_snapshot

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


def exposition(num_generated=0, **changes):
    """Return what /metrics of an engine in this state says."""
    metrics = EngineMetrics("demo")
    metrics.snapshot(
        EngineStats(
            scheduler=dataclasses.replace(STATS, **changes),
            num_requests=8,
            scheduler_s=0.5,
            device_s=1.0,
            at=0.0,
        )
    )
    metrics.generated(num_generated)
    return metrics.render()[0].decode()


@contextmanager
def server_that_says(text, status=200):
    """Answer every GET with this."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
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


def test_picture_shows_levels_in_order():
    """Levels come in the order in which they run, 11 after 3, with their counts."""
    console = Console(width=100)
    with console.capture() as capture:
        console.print(picture("http://x", None, read_snapshot(exposition(), at=0.0)))
    lines = [line.split() for line in capture.get().splitlines()]
    levels = [(line[0], line[1]) for line in lines if len(line) > 1 and line[0] in {"0", "3", "11"}]
    assert levels == [("0", "2"), ("3", "5"), ("11", "1")]
    assert ["device", "used", "50"] in [line[:3] for line in lines]


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
    ],
)
def test_a_server_of_another_kind(capsys, text, status, words):
    """Whatever else listens there, the complaint is one line."""
    with server_that_says(text, status) as url:
        assert cli.main(["top", url, "--once"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
