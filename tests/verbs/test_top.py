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
from fastserve.verbs.server_snapshot import read_snapshot
from fastserve.verbs.top import picture
from tests.verbs.test_server_snapshot import (
    FORECASTS,
    WITH_HOST,
    WORK,
    exposition,
    replica_exposition,
)


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


def test_work_takes_the_place_of_levels_where_it_is_predicted():
    """Levels say nothing then: what is expected of requests does, least first."""
    lines = drawn(100, forecasts=FORECASTS, requests_by_work=WORK)
    words = [" ".join(line.split()) for line in lines]
    assert not any("level" in line for line in words)
    at = words.index("requests by machine seconds left")
    named = [line.split(" s ")[0].strip() for line in lines[at + 1 : at + 6]]
    assert named == ["0-0.01", "0.01-0.1", "0.1-1", "1-10", "10+"]
    assert [line.split()[2] for line in words[at + 1 : at + 6]] == ["0", "5", "2", "0", "1"]
    assert "expected work, s 1,234.5 predicted/answered 1.25" in words
    assert "at arrivals, s 8.2 answers 200" in words


def test_deciles_are_bars_at_half_height_where_they_are_right():
    """A tenth is half, two tenths and more are full; the least and the largest share are told."""
    flat = dataclasses.replace(FORECASTS, num_by_decile=(30,) * 10)
    skew = dataclasses.replace(FORECASTS, num_by_decile=(0, 5, 10, 15, 20, 50, 0, 0, 0, 0))
    for forecasts, bar in ((flat, "▄▄▄▄▄▄▄▄▄▄  10-10 %"), (skew, " ▂▄▆██      0-50 %")):
        drawing = drawn(100, forecasts=forecasts, requests_by_work=WORK)
        assert f"answers by predicted decile  {bar}" in [line.rstrip() for line in drawing]


def test_before_the_first_answer_there_is_no_calibration():
    """Nothing is divided by nothing."""
    none = dataclasses.replace(
        FORECASTS, num_by_decile=(0,) * 10, predicted_tokens=0.0, answered_tokens=0
    )
    words = [" ".join(line.split()) for line in drawn(100, forecasts=none, requests_by_work=WORK)]
    assert "expected work, s 1,234.5 predicted/answered -" in words
    assert not any("decile" in line for line in words)


def test_the_share_of_prompts_that_was_cached():
    """Of all tokens that were looked up; a dash before the first."""
    words = [" ".join(line.split()) for line in drawn(100)]
    assert "prompts cached - recomputed 0" in words
    changes = {"num_cached_prompt_tokens": 300, "num_computed_prompt_tokens": 100}
    words = [" ".join(line.split()) for line in drawn(100, num_recomputed_tokens=12, **changes)]
    assert "prompts cached 75 % recomputed 12" in words


def test_both_tiers_and_the_link_are_drawn():
    """Bytes of demand and ahead of it each way, by the second, and the time that copies cost."""
    counts = {
        "num_swapped_out_blocks": 3,
        "num_saved_blocks": 5,
        "num_swapped_in_blocks": 2,
        "num_fetched_blocks": 1,
        "num_swaps": 4,
        "copy_wait_s": 0.5,
    }
    host = {"host_blocks_total": 400, "host_blocks_free": 390, "host_blocks_used": 10}
    before = read_snapshot(exposition(info=WITH_HOST), at=10.0)
    now = read_snapshot(exposition(info=WITH_HOST, **counts, **host), at=12.0)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(picture("http://x", before, now, width=80))
    words = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert "to the host, MB/s 4.0 back, MB/s 1.5" in words
    assert "swaps 4 waits for copies 25.0 %" in words
    bars = {tuple(line.split()[:3]): line.count("█") for line in words if "█" in line}
    assert bars["device", "used", "50"] == 20
    assert bars["host", "free", "390"] == 39  # each tier is a whole of its own
    assert not any("MB/s" in line for line in drawn(80))


def test_replicas_are_shown_apart_and_as_one():
    """Sums above, then a line for each: what it runs, holds and says, and how often it died."""
    looks = [
        read_snapshot(replica_exposition(generated=generated), at=at)
        for at, generated in ((10.0, (0, 0)), (12.0, (100, 50)))
    ]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(picture("http://x", *looks, width=80))
    words = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert "replicas 1 of 3 serve" in words
    assert "running 7 output tokens/s 75.0" in words
    at = words.index("replica run wait KV tok/s died")
    assert words[at + 1 : at + 4] == [
        "0 3 5 50 % 50.0 1",
        "1 4 5 50 % 25.0 0",
        "2 - - - - 0",
    ]
    assert not any(line.startswith("replica") for line in drawn(80))


def test_replicas_fit_a_narrow_terminal():
    """Six columns in as many characters as the rest of the picture needs."""
    console = Console(width=40)
    now = read_snapshot(replica_exposition(), at=1.0)
    with console.capture() as capture:
        console.print(picture("http://x", None, now, width=40))
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert max(map(len, lines)) <= 40
    assert "…" not in "".join(lines)


def test_picture_names_the_model_and_its_uptime():
    """What is watched, and since when it runs."""
    assert [line.rstrip() for line in drawn(100)[:3]] == [
        "fastserve top  http://x",
        "model demo",
        "up 1:02:05",
    ]


@pytest.mark.parametrize("width", [100, 80, 64, 63, 40, 32])
@pytest.mark.parametrize("predicts", [False, True])
def test_picture_fits_the_terminal(width, predicts):
    """Every figure keeps its name and its number in one line, however narrow it is."""
    changes = {"forecasts": FORECASTS, "requests_by_work": WORK} if predicts else {}
    changes |= {"info": WITH_HOST, "host_blocks_total": 4, "host_blocks_moving": 4}
    lines = [line.rstrip() for line in drawn(width, device_blocks_free=1_000_000, **changes)]
    assert max(map(len, lines)) <= width
    words = " ".join(" ".join(line.split()) for line in lines)
    for text in (
        "preemptions/s -",
        "ms to decide a step -",
        "demotions 7",
        "device free 1,000,000",
        "host moving 4",
        "waits for copies -",
        *(["at arrivals, s 8.2", "answers 200", "▄ 10-10 %", "10+ s 1"] if predicts else ()),
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
