"""Asks a live server for answers whose length only the client knows, and times them.

Rules: every request may fill the model's window and ignores the end of text; its client reads as
many tokens as it wants and closes the stream, which aborts the request. So no length is told, and
what was generated beyond the last token wanted counts for nothing but `overrun_tokens`. JCT counts
from the moment a request was due. Must not know: how a server is started, policies, reports.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from benchmarks.mixed_workload import Ask, Lengths, Workload, draw_mix, with_prompts
from fastserve.bench.stream_client import Endpoint, LostRequestError, ask
from fastserve.host.http_client import open_client
from fastserve.verbs.server_snapshot import Snapshot, read_snapshot

WARM_UP_REQUESTS = 12
RAMP_SECONDS = 5.0
REST_SECONDS = 10.0  # for the server to end what nobody reads any more
QUIET_SECONDS = 1.5  # a server that runs something says so every half second
METRICS_SECONDS = 10.0


class Timing(NamedTuple):
    """One answered request, in seconds of one clock; the fields of sim.measures.Times."""

    arrived_at: float
    first_token_at: float
    finished_at: float
    max_gap_s: float
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """A server under the workload."""

    timings: list[Timing]
    lost: list[str]
    makespan_s: float
    lateness_s: float  # the most that a request was sent after it was due
    overrun_tokens: int  # that the server generated and no client wanted


def body_of(request: Ask) -> dict[str, Any]:
    """Return the body that asks for greedy tokens up to the window, as ids."""
    body: dict[str, Any] = {
        "prompt": request.prompt_token_ids,
        "max_tokens": None,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "return_token_ids": True,
    }
    return {**body, "user": request.client} if request.client else body


async def answered(
    endpoint: Endpoint, request: Ask, due: float, on_piece: Callable[[], None] = lambda: None
) -> Timing:
    """Send one request, read what is wanted of its answer, and return its times."""
    wanted = request.num_output_tokens
    answer = await ask(endpoint, body_of(request), on_piece, num_wanted=wanted)
    times = answer.piece_times
    longest = max((later - sooner for sooner, later in pairwise(times)), default=0.0)
    return Timing(due, times[0], times[-1], longest, answer.output_tokens)


async def warm_up(endpoint: Endpoint, seed: int) -> None:
    """Read a few short answers and forget them."""
    rng = random.Random(f"warm-up {seed}")  # prompts that the workload does not have
    requests = with_prompts(rng, draw_mix(seed, WARM_UP_REQUESTS, long_share=0.0))
    await asyncio.gather(*(answered(endpoint, each, time.perf_counter()) for each in requests))


async def measure_capacity(
    endpoint: Endpoint, seed: int, lengths: Sequence[Lengths], in_flight: int, seconds: float
) -> float:
    """Return the tokens a second that clients read with always `in_flight` of them waiting.

    Raises RuntimeError when a request is lost.
    """
    await warm_up(endpoint, seed)
    rng = random.Random(f"capacity {seed}")
    shuffled = rng.sample(lengths, len(lengths))
    requests = with_prompts(rng, itertools.cycle(shuffled))
    read = Counts()
    clients = [asyncio.create_task(keep_asking(endpoint, requests, read)) for _ in range(in_flight)]
    await asyncio.wait(clients, timeout=RAMP_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
    started, before = time.perf_counter(), read.pieces
    await asyncio.wait(clients, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    elapsed, counted = time.perf_counter() - started, read.pieces - before
    for task in clients:
        task.cancel()
    for outcome in await asyncio.gather(*clients, return_exceptions=True):
        if not isinstance(outcome, asyncio.CancelledError):
            raise RuntimeError("a client of the capacity run ended") from outcome
    # A piece may stand for several tokens: whole answers tell how many on average.
    return counted * read.done_tokens / read.done_pieces / elapsed


@dataclass(slots=True)
class Counts:
    """What the clients of a capacity run have read; `done_` is of whole answers."""

    pieces: int = 0
    done_pieces: int = 0
    done_tokens: int = 0


async def keep_asking(endpoint: Endpoint, requests: Iterator[Ask], read: Counts) -> None:
    """Read one answer after the other, until cancelled."""
    for request in requests:
        mine = 0

        def count() -> None:
            nonlocal mine
            mine += 1
            read.pieces += 1

        timing = await answered(endpoint, request, time.perf_counter(), count)
        read.done_pieces += mine
        read.done_tokens += timing.output_tokens


async def run_workload(
    endpoint: Endpoint, seed: int, workload: Workload, on_done: Callable[[], None] = lambda: None
) -> Run:
    """Warm up, send every request when it is due, and read what is wanted of every answer.

    Raises RuntimeError when a request goes on after its client has left.
    """
    await warm_up(endpoint, seed)
    timings: list[Timing] = []
    lost: list[str] = []
    lateness = 0.0
    before = await at_rest(endpoint)
    start = time.perf_counter()

    async def client(request: Ask, due: float) -> None:
        try:
            timings.append(await answered(endpoint, request, due))
        except (LostRequestError, OSError) as error:
            lost.append(f"{type(error).__name__}: {error}")
        on_done()

    async with asyncio.TaskGroup() as group:
        for request, due_s in zip(workload.requests, workload.due_s, strict=True):
            due = start + due_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            lateness = max(lateness, time.perf_counter() - due)
            group.create_task(client(request, due))
    makespan = time.perf_counter() - start
    generated = num_generated(await at_rest(endpoint)) - num_generated(before)
    overrun = generated - sum(timing.output_tokens for timing in timings)
    return Run(timings, lost, makespan, lateness, overrun)


async def at_rest(endpoint: Endpoint, patience_s: float = REST_SECONDS) -> Snapshot:
    """Return the server's metrics once it runs nothing; RuntimeError if it goes on."""
    url = f"http://{endpoint.host}:{endpoint.port}/metrics"
    began = quiet_since = time.monotonic()
    with open_client(url, timeout_s=METRICS_SECONDS, is_direct=True) as client:
        while True:
            now = time.monotonic()
            text = client.get(url, headers=dict(endpoint.headers)).raise_for_status().text
            found = read_snapshot(text, now)
            if num_running := found.running + found.waiting:
                quiet_since = now
            elif now - quiet_since >= QUIET_SECONDS:
                return found
            if num_running and now - began > patience_s:
                raise RuntimeError(f"{num_running} requests run that no client reads")
            await asyncio.sleep(0.1)  # another process: there is nothing to wait on


def num_generated(found: Snapshot) -> int:
    """Return the tokens that were sampled, those dropped behind the end of a request too."""
    totals = found.totals
    return int(totals["generation_tokens_total"] + totals["dropped_samples_total"])
