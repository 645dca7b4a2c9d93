"""`fastserve bench serve` against a live server of the bundled model."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from fastserve import cli
from fastserve.bench.requests import Planned
from fastserve.bench.serve import Target, as_table, readable, send
from fastserve.bench.serve_config import ServeBenchConfig
from fastserve.bench.serve_report import figures
from fastserve.bench.stream_client import Answer, LostRequestError
from tests.bench.test_serve_report import RUN
from tests.server.conftest import API_KEY, serving
from tests.verbs.test_top import server_that_says


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of a live server."""
    with serving() as (_, found):
        yield found


def run(url: str, path: Path, *flags: str) -> dict[str, Any]:
    """Measure a server and return the result."""
    argv = ["bench", "serve", "--base-url", url, "--api-key", API_KEY, "--output", str(path)]
    assert cli.main([*argv, "--disable-tqdm", *flags]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize("asked", ["99", "50,90,99.9"])
def test_the_table_shows_the_percentiles_asked_for(asked):
    """A column for each, and no cell of it is empty."""
    config = ServeBenchConfig(metric_percentiles=asked)
    table = as_table({"model_id": "m", **figures(RUN, config)}, config.percentiles())
    names = [f"p{percent}" for percent in asked.split(",")]
    assert [str(column.header) for column in table.columns] == ["ms", "mean", "median", *names]
    assert table.row_count == 7
    assert all(cell for column in table.columns for cell in column.cells)


@pytest.mark.processes
def test_random_requests(url, tmp_path, capsys):
    """Every answer has its length, and the latencies add up."""
    flags = ["--num-prompts", "12", "--random-input-len", "40", "--random-output-len", "9"]
    flags += ["--max-concurrency", "4", "--num-warmups", "2", "--save-detailed"]
    found = run(url, tmp_path / "made" / "result.json", *flags)
    assert (found["completed"], found["failed"], found["num_prompts"]) == (12, 0, 12)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (12 * 40, 12 * 9)
    assert found["output_lens"] == [9] * 12
    assert found["model_id"] == "demo"
    assert (found["request_rate"], found["max_concurrency"]) == ("inf", 4)
    assert found["output_throughput"] == pytest.approx(12 * 9 / found["duration"])
    whole = found["mean_ttft_ms"] + 8 * found["mean_tpot_ms"]
    assert found["mean_e2el_ms"] == pytest.approx(whole)
    assert found["mean_norm_latency_ms"] * 9 == pytest.approx(1e3 * found["mean_jct_s"])
    assert found["mean_jct_s"] * 1e3 >= found["mean_e2el_ms"]
    assert found["mean_slowdown"] is None
    assert found["client_cpu_share"] > 0
    for name in ("ttft", "tpot", "itl", "e2el"):
        assert 0 < found[f"median_{name}_ms"] <= found[f"p99_{name}_ms"]
    assert "12 requests in" in capsys.readouterr().out


@pytest.mark.processes
def test_a_trace_and_requests_alone(url, tmp_path):
    """The run lasts as long as the trace; slowdown is of the requests that ran once more alone."""
    trace = tmp_path / "trace.csv"
    rows = [f"{0.01 * i},{20 + i},{6 + i}\n" for i in range(10)] + ["0.5,8,4\n"]
    trace.write_text("arrived_at,prompt_tokens,output_tokens\n" + "".join(rows))
    found = run(
        url, tmp_path / "result.json", "--trace", str(trace), "--measure-alone", "4",
        "--save-detailed",
    )  # fmt: skip
    assert found["output_lens"] == [*range(6, 16), 4]
    assert found["input_lens"] == [*range(20, 30), 8]
    assert found["duration"] > 0.5
    assert 0 < found["p50_slowdown"] <= found["p99_slowdown"]


@pytest.mark.processes
def test_chats(url, tmp_path):
    """Words instead of ids; what the server counts is what is reported."""
    flags = ["--backend", "openai-chat", "--num-prompts", "3", "--input-len", "10"]
    found = run(url, tmp_path / "result.json", *flags, "--output-len", "5", "--num-warmups", "1")
    assert (found["completed"], found["total_output_tokens"]) == (3, 15)
    assert found["total_input_tokens"] >= 30


@pytest.mark.processes
def test_lost_requests_are_counted_and_named(url, tmp_path, capsys):
    """An id that the model lacks is refused by the server; the first reason is the last line."""
    path = tmp_path / "result.json"
    argv = ["bench", "serve", "--base-url", url, "--api-key", API_KEY]
    argv += ["--num-prompts", "2", "--output", str(path), "--random-vocab-size", "100000"]
    assert cli.main(argv) == 1
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert last.startswith("fastserve: error: all 2 requests were lost: 400: ")
    assert "{" not in last
    assert said.out == ""
    found = json.loads(path.read_text())
    assert (found["completed"], found["failed"], found["mean_ttft_ms"]) == (0, 2, None)
    assert cli.main([*argv, "--num-warmups", "1"]) == 2
    assert "400" in capsys.readouterr().err


@pytest.mark.processes
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--api-key", "wrong"], "401: Incorrect API key provided. (--api-key"),
        (["--api-key", "wrong", "--model", "demo"], "401"),
        (["--api-key", "schlüssel"], "--api-key: a key is plain ASCII"),
        (["--model", "gpt-9"], "has no 'gpt-9'; it has: demo"),
        (["--random-input-len", "2000"], "2000 + 64 tokens exceed the model's window of 2048"),
        (["--random-prefix-len", "1900"], "2028 + 64 tokens exceed"),
        (["--random-range-ratio", "0.5", "--input-len", "1400"], "2100 + 96 tokens exceed"),
    ],
)
def test_what_would_lose_every_request_is_said_before_the_first(url, capsys, flags, words):
    """One line and exit code 2, and nothing is sent."""
    argv = ["bench", "serve", "--base-url", url, "--api-key", API_KEY]
    assert cli.main([*argv, *flags]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1


@pytest.mark.processes
def test_the_defaults_suit_the_demo(url, monkeypatch, capsys):
    """A bare command sends short requests and ends; in a pipe it draws no bar."""
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    port = url.rpartition(":")[2]
    assert cli.main(["bench", "serve", "--port", port, "--num-prompts", "3"]) == 0
    said = capsys.readouterr()
    assert said.err == f"3 requests of 128 + 64 tokens at once to demo at http://127.0.0.1:{port}\n"
    assert "3 requests in" in said.out
    assert "\x1b" not in said.out


@pytest.mark.parametrize("width", [40, 80])
def test_the_table_keeps_its_numbers_in_a_narrow_terminal(monkeypatch, width):
    """A figure that is cut off is worse than none."""
    monkeypatch.setenv("COLUMNS", str(width))
    config = ServeBenchConfig()
    console = Console()
    with console.capture() as capture:
        table = as_table({"model_id": "m", **figures(RUN, config)}, config.percentiles())
        console.print(table)
    assert "…" not in capture.get()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.01234, "0.012"), (1.23456, "1.235"), (99.96, "99.96"), (123.45, "123.5"),
     (12345.6, "12,346")],
)  # fmt: skip
def test_figures_have_four_digits(value, text):
    """Enough to compare, few enough to read."""
    assert readable(value) == text


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"id": "m", "owned_by": "fastserve", "max_model_len": None}, "m is still loading"),
        ({"name": "m"}, "name one with --model"),
        ([], "name one with --model"),
    ],
)
def test_a_server_that_is_not_ready_or_not_known(capsys, card, words):
    """Which it is, in one line."""
    text = json.dumps({"data": [card] if card else []})
    with server_that_says(text) as url:
        assert cli.main(["bench", "serve", "--base-url", url]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output", "/proc/none/x.json"], "--output /proc/none/x.json: "),
        (["--save-result", "--result-dir", "/proc/none"], "--result-dir /proc/none/"),
        (
            ["--save-result", "--result-filename", "/proc/none/x"],
            "--result-filename /proc/none/x: ",
        ),
        (["--request-rate", "0"], "--request-rate"),
        (["--num-prompts", "0"], "--num-prompts"),
        (["--base-url", "http://127.0.0.1:99999"], "--base-url"),
        (["--base-url", "http://[::1"], "--base-url"),
        (["--host", "::1", "--port", "1"], "http://[::1]:1/v1/models: "),
    ],
)
def test_settings_that_cannot_be_honoured(capsys, flags, words):
    """The flag is named before a server is asked, not after an hour of measuring."""
    assert cli.main(["bench", "serve", *flags]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"fastserve: error: {words}")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--port", "1"],
        ["--port", "1", "--model", "demo"],
        ["--base-url", "ftp://nobody"],
        ["--trace", "/nonexistent.csv"],
        ["--num-prompts", "0"],
    ],
)
def test_a_server_that_is_not_there_is_one_line(capsys, flags):
    """Like every setting that cannot be honoured, with exit code 2."""
    assert cli.main(["bench", "serve", *flags]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("fastserve: error: ")
    assert said.err.count("\n") == 1


class Counting:
    """A server that counts who is there at once, and loses every third request."""

    def __init__(self, max_concurrency: int | None) -> None:
        self.config = ServeBenchConfig(max_concurrency=max_concurrency)
        self.num_here = self.most = self.num_asked = 0

    async def ask(self, request: Planned, on_piece: Callable[[], None]) -> Answer:
        """Stay for three turns of the loop."""
        self.num_asked += 1
        self.num_here += 1
        self.most = max(self.most, self.num_here)
        for _ in range(3):
            await asyncio.sleep(0)
        self.num_here -= 1
        if request.num_output_tokens % 3 == 0:
            raise LostRequestError("lost")
        return Answer(time.perf_counter(), [time.perf_counter()], 1, request.num_output_tokens)


@pytest.mark.parametrize(("limit", "most"), [(None, 20), (4, 4), (1, 1)])
def test_concurrency_is_bounded(limit, most):
    """As many at once as allowed, results in order, losses in their places."""
    target = Counting(limit)
    requests = [Planned(0.0, [1], 1 + index) for index in range(20)]
    done: list[None] = []
    sent = asyncio.run(send(cast(Target, target), requests, lambda: done.append(None)))
    assert (target.most, target.num_asked, len(done)) == (most, 20, 20)
    for index, one in enumerate(sent):
        is_lost = (1 + index) % 3 == 0
        assert one.error == ("lost" if is_lost else None)
        assert is_lost or (one.answer and one.answer.output_tokens == 1 + index)


def test_requests_go_out_when_they_are_due():
    """Not before, and JCT counts from that moment."""
    target = Counting(None)
    requests = [Planned(due_s, [1], 1) for due_s in (0.0, 0.03, 0.06)]
    began = time.perf_counter()
    sent = asyncio.run(send(cast(Target, target), requests, lambda: None))
    for one, due_s in zip(sent, (0.0, 0.03, 0.06), strict=True):
        assert one.answer
        assert one.due >= began + due_s
        assert one.answer.sent_at >= one.due
        assert one.jct >= 0.0
