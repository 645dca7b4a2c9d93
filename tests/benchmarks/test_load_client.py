"""Clients that stop reading, against a live server of the bundled model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from benchmarks.load_client import (
    WARM_UP_REQUESTS,
    answered,
    at_rest,
    body_of,
    measure_capacity,
    run_workload,
)
from benchmarks.mixed_workload import Ask, Lengths, Workload, draw_workload
from fastserve.bench.stream_client import Endpoint
from tests.server.conftest import API_KEY, serving

WINDOW = 2048
HEADERS = {"Authorization": f"Bearer {API_KEY}"}


def test_no_length_is_told():
    """A body says of the answer only that it may fill the window; its client is OpenAI's user."""
    body = body_of(Ask([1, 2], 77, "ann"))
    assert 77 not in body.values()
    assert body["max_tokens"] is None  # left out, it would be 16
    assert body["ignore_eos"] is True
    assert body["user"] == "ann"
    assert "user" not in body_of(Ask([1, 2], 77))


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    """A live server."""
    with serving("--max-num-seqs", "4") as (_, url):
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        yield Endpoint(parts.hostname, parts.port, headers=tuple(HEADERS.items()))


def num_aborted(endpoint: Endpoint) -> int:
    """Return how many requests of a server have ended because their client left."""
    url = f"http://{endpoint.host}:{endpoint.port}/metrics"
    [line] = [
        line
        for line in httpx.get(url, headers=HEADERS).text.splitlines()
        if line.startswith("fastserve:request_success_total") and 'reason="abort"' in line
    ]
    return int(float(line.split()[-1]))


@pytest.mark.processes
def test_exactly_what_is_wanted_is_counted_and_nothing_runs_on(endpoint):
    """Every request is aborted by its client, long before it has filled the window."""
    wanted = [1, 9, 40, 17, 2, 30, 64, 25]
    workload = draw_workload(0, [Lengths(20, each, "ann") for each in wanted], rate=200.0)
    before = num_aborted(endpoint)
    done: list[None] = []
    run = asyncio.run(run_workload(endpoint, 0, workload, lambda: done.append(None)))
    assert run.lost == []
    assert len(done) == len(wanted)
    assert sorted(timing.output_tokens for timing in run.timings) == sorted(wanted)
    for timing in run.timings:
        assert timing.arrived_at < timing.first_token_at <= timing.finished_at
        assert timing.finished_at - timing.arrived_at <= run.makespan_s
    assert num_aborted(endpoint) - before == WARM_UP_REQUESTS + len(wanted)
    assert 0 <= run.overrun_tokens < len(wanted) * WINDOW / 4


@pytest.mark.processes
def test_an_answer_may_be_read_to_the_end_of_the_window(endpoint):
    """Then the server ends it; one token more does not come, and the request is lost."""
    full = Workload([Ask([5] * (WINDOW - 6), 6), Ask([7] * (WINDOW - 6), 7)], [0.0, 0.0])
    run = asyncio.run(run_workload(endpoint, 0, full))
    assert [timing.output_tokens for timing in run.timings] == [6]
    assert run.lost == ["LostRequestError: 6 of 7 tokens, ended by length"]


@pytest.mark.processes
def test_a_server_that_runs_on_is_found(endpoint):
    """It is not at rest while somebody reads, and it is once they have left."""

    async def leave_in_the_middle():
        begun = asyncio.Event()
        asking = answered(endpoint, Ask([3] * 8, WINDOW - 8), time.perf_counter(), begun.set)
        reader = asyncio.create_task(asking)
        await begun.wait()
        with pytest.raises(RuntimeError, match="1 requests run that no client reads"):
            await at_rest(endpoint, patience_s=0.1)
        reader.cancel()
        return await at_rest(endpoint)

    found = asyncio.run(leave_in_the_middle())
    assert (found.running, found.waiting) == (0, 0)


@pytest.mark.processes
def test_capacity_is_what_clients_read(endpoint, monkeypatch):
    """In a second no more than the server generated in all, and not much less than its mean."""
    monkeypatch.setattr("benchmarks.load_client.RAMP_SECONDS", 0.1)
    before = asyncio.run(at_rest(endpoint))
    started = time.monotonic()
    found = asyncio.run(measure_capacity(endpoint, 0, [Lengths(20, 8), Lengths(20, 30)], 4, 1.0))
    after = asyncio.run(at_rest(endpoint))
    seconds = time.monotonic() - started
    name = "generation_tokens_total"
    generated = after.totals[name] - before.totals[name]
    assert 0.5 * generated / seconds < found < 1.1 * generated
