"""Connections to a live server that are cut at any byte: resumed, or given up without a trace."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import openai
import pytest

from benchmarks.footprint import Footprint, footprint
from benchmarks.process_cpu import children_of, engine_of
from benchmarks.resuming_client import Received, receive, receive_in_pieces
from fastserve.bench.stream_client import Endpoint
from tests.server.conftest import API_KEY, serving

pytestmark = pytest.mark.processes

MAX_CUTS = 3
KEY = {"Authorization": f"Bearer {API_KEY}"}
WARM_UP = 100
SMALL_POOL = ("--num-device-blocks", "200", "--swap-space", "0")  # all of it is touched early on
MAX_GROWTH_BYTES = 24 * 2**20
LONG = {"prompt": "The for statement", "max_tokens": 1900, "ignore_eos": True, "stream": True}
ABORTED = 'request_success_total{engine="0",finished_reason="abort"'
# What lost clients asked for, as far as it is left: requests, what they said, the KV they hold.
UNDER_WAY = ("num_requests_", "resumable_", "replay_", "kv_cache_usage_perc")
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1, "top_p": 1, "seed": 11, "n": 2},
    {"temperature": 1, "top_k": 50, "seed": 12, "stream_options": {"include_usage": True}},
    {"temperature": 0, "logprobs": 2, "return_token_ids": True},
]


def endpoint_of(url: str, path: str = "/v1/completions") -> Endpoint:
    """Return where requests to a server go."""
    host, port = url.removeprefix("http://").split(":")
    return Endpoint(host, int(port), path, headers=tuple(KEY.items()))


def requests(num_streams: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield paths and bodies of all kinds."""
    for i in range(num_streams):
        body = {"max_tokens": 20 + i % 40, "ignore_eos": True, "stream": True}
        text = f"Number {i}: the for statement and lists"
        if i % 5 == 4:
            messages = [{"role": "user", "content": text}]
            yield "/v1/chat/completions", {**body, "messages": messages, "temperature": 0}
        else:
            yield "/v1/completions", {**body, "prompt": text, **KINDS[i % 5]}


def said(events: bytes) -> dict[str, Any]:
    """Return all that a stream says, however it is cut into events, and that it ended well."""
    *pieces, done, end = re.sub(rb"^id: \S+\n", b"", events, flags=re.MULTILINE).split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    told: dict[str, Any] = {}
    for piece in pieces:
        chunk = json.loads(piece.removeprefix(b"data: "))
        told["usage"] = chunk.get("usage") or told.get("usage")
        for choice in chunk["choices"]:
            text = choice.get("text") or choice.get("delta", {}).get("content") or ""
            key = choice["index"]
            told[f"text {key}"] = told.get(f"text {key}", "") + text
            told[f"ids {key}"] = told.get(f"ids {key}", []) + choice.get("token_ids", [])
            told[f"end {key}"] = choice["finish_reason"]
    return told


def counted(client: httpx.Client, *beginnings: str) -> float:
    """Return the sum of those of a server's metrics that begin so, labels and all."""
    found = re.findall(r"^fastserve:(\S+{.*}) (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return sum(float(value) for name, value in found if name.startswith(beginnings))


@pytest.mark.parametrize(
    ("num_streams", "kills_engine"),
    [
        (30, False),
        pytest.param(100, False, marks=pytest.mark.slow),
        pytest.param(100, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(600)
def test_streams_cut_at_random_bytes_are_the_undisturbed_ones(num_streams, kills_engine):
    """Pieces and rest are, byte for byte, the stream; it says what it says when nothing is cut."""
    num_cuts = 0
    wholes: list[Received] = []

    async def undisturbed(path: str, body: dict[str, Any]) -> Received:
        whole = await receive(endpoint_of(url, path), body)
        assert (whole.status, whole.is_whole) == (200, True)
        return whole

    async def disturbed(number: int, path: str, body: dict[str, Any], num_bytes: int) -> int:
        rng = random.Random(f"cut {number}")
        endpoint = endpoint_of(url, path)
        cuts = [rng.randrange(1, num_bytes) for _ in range(rng.randint(1, MAX_CUTS))]
        resumed = await receive_in_pieces(endpoint, body, cuts, on_cut)
        assert resumed.last_event_id is not None
        start = resumed.last_event_id.partition(":")[0] + ":0"
        again = await receive(endpoint, body, last_event_id=start)
        assert resumed.events == again.body
        assert said(resumed.events) == said(wholes[number].body)
        return resumed.num_resumed

    def on_cut() -> None:
        nonlocal num_cuts
        num_cuts += 1
        if kills_engine and num_cuts == num_streams // 2:
            os.kill(engine_of(process.pid), signal.SIGKILL)

    async def run() -> None:
        asked = list(requests(num_streams))
        wholes.extend(await asyncio.gather(*(undisturbed(*request) for request in asked)))
        sizes = [whole.num_raw_bytes for whole in wholes]
        counts = await asyncio.gather(
            *(disturbed(i, *request, sizes[i]) for i, request in enumerate(asked))
        )
        assert len(counts) == num_streams
        assert sum(counts) > num_streams
        assert num_cuts > num_streams

    with serving("--stream-grace", "600", "--max-num-seqs", "16") as (process, url):
        asyncio.run(run())
        with httpx.Client(base_url=url, headers=KEY) as client:
            assert counted(client, "engine_restarts_total") == kills_engine
            assert (counted(client, "requests_resumed_total") > 0) is kills_engine
        with openai.OpenAI(base_url=url + "/v1", api_key=API_KEY) as other:  # ids are no matter
            chunks = other.completions.create(model="demo", prompt="a", max_tokens=5, stream=True)
            assert "".join(chunk.choices[0].text for chunk in chunks)


async def open_and_cut(url: str, num_streams: int, seed: str) -> None:
    """Open streams, some at a time, and cut each within its first events."""
    rng = random.Random(seed)
    at_once = asyncio.Semaphore(50)

    async def one(num_bytes: int) -> None:
        async with at_once:
            received = await receive(endpoint_of(url), LONG, num_bytes=num_bytes)
            assert received.num_raw_bytes == num_bytes

    await asyncio.gather(*(one(rng.randrange(1, 4000)) for _ in range(num_streams)))


def at_rest(
    client: httpx.Client, pids: Sequence[int], expected: list[Footprint] | None
) -> list[Footprint]:
    """Wait until nothing is left to do, and descriptors and threads are as before; return them."""
    found: list[Footprint] = []
    for _ in range(200):
        num_left = counted(client, *UNDER_WAY)  # its own connection stays, and counts each time
        found = [footprint(pid) for pid in pids]
        if not num_left and [one[:2] for one in found] == [one[:2] for one in expected or found]:
            return found
        time.sleep(0.1)  # another process: there is nothing to wait on
    pytest.fail(f"{num_left} left; {found} instead of {expected}")


@pytest.mark.parametrize(
    ("num_streams", "grace_s"),
    [
        (100, "1"),
        pytest.param(2000, "0", marks=pytest.mark.slow),
        pytest.param(2000, "1", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(600)
def test_streams_that_are_cut_and_given_up_leave_nothing(num_streams, grace_s, monkeypatch):
    """Descriptors, threads, KV, events and memory are those of an idle server."""
    # A product is set up for each number of rows; 1,000 of them are kept, and would hide a leak.
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.setenv(name, "16")
    flags = ("--stream-grace", grace_s, *SMALL_POOL)
    with serving(*flags) as (process, url), httpx.Client(base_url=url, headers=KEY) as client:
        pids = [process.pid, *children_of(process.pid)]
        asyncio.run(open_and_cut(url, WARM_UP, "warm-up"))
        before = at_rest(client, pids, None)
        num_aborted = counted(client, ABORTED)
        asyncio.run(open_and_cut(url, num_streams, "cut"))
        after = at_rest(client, pids, before)
        assert counted(client, ABORTED) - num_aborted == num_streams
        for one, other in zip(before, after, strict=True):
            assert other.rss_bytes - one.rss_bytes < MAX_GROWTH_BYTES
