"""A server under load for a long time: does it leak, does it forget, does it say something else?

    python -m benchmarks.soak [--minutes 30] [--load 0.9] [--output FILE]

A live server of the demo model with little KV serves clients that ask, hang up, lose their
connection and come back, ask for nonsense, and ask canaries: requests whose answer is known. The
load is the share of its seats (--max-num-seqs) that run a request, on average; the rate of clients
follows it, so that it is right on a machine that others use too: at every look the logarithm of the
rate moves by GAIN times what the load lacks. All that it ever lacked, added up, is then how far the
rate has gone, over GAIN: next to nothing beside a long run. Memory of both processes is taken every
few seconds; its slope counts once the first third is over.

The server is `--deterministic`, so that a canary that says something else is a fault and no tie.
torch and oneDNN would keep some 1,000 products, one for each number of rows, and fill 250 MiB with
them over time; they are told to keep 16, so that memory shows what leaks.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from dataclasses import dataclass, field
from math import exp
from statistics import fmean
from typing import Any

import httpx
import uvloop
from rich.console import Console
from rich.progress import Progress

from benchmarks.command import command_parser, origin
from benchmarks.footprint import footprint
from benchmarks.live_server import LiveServer, live_process
from benchmarks.process_cpu import PROC, engine_of
from benchmarks.soak_figures import Sample, course, memory
from benchmarks.soak_requests import FAULTS, Clients
from fastserve.bench.stream_client import Endpoint
from fastserve.host.provenance import output_path, write_result
from fastserve.settings.option import ConfigError
from fastserve.verbs.server_snapshot import Snapshot, read_snapshot

NUM_SEATS = 8
FLAGS = (
    "demo", "--num-threads", "1", "--deterministic", "--max-num-seqs", str(NUM_SEATS),
    "--max-model-len", "1280", "--num-device-blocks", "84", "--swap-space", "0.01",
    "--stream-grace", "20", "--disable-log-requests",
)  # fmt: skip
VARIABLES = {"LRU_CACHE_CAPACITY": "16", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
SEED = 1
FIRST_RATE = 8.0  # clients a second
GAIN = 0.1
SAMPLE_S = 5.0
LOOKS_A_SAMPLE = 10  # at how many seats are taken
MAX_IN_FLIGHT = 4 * NUM_SEATS  # beyond, clients stay away: a queue hides that the rate is too high
WARM_SHARE = 1 / 3
REST_S = 120.0
COUNTED = (
    "generation_tokens_total", "num_preemptions_total", "swaps_total", "recomputed_tokens_total",
    "engine_restarts_total",
)  # fmt: skip


@dataclass(slots=True)
class Soak:
    """A server, its clients, and what was seen of it."""

    server: LiveServer
    load: float
    clients: Clients
    metrics: httpx.AsyncClient
    rate: float = FIRST_RATE
    num_held_back: int = 0
    samples: list[Sample] = field(default_factory=list)

    async def exposition(self) -> str:
        """Return what the server says of itself now."""
        return (await self.metrics.get("/metrics")).raise_for_status().text

    async def share_of_seats(self) -> float | None:
        """Return how many of its seats run a request, over all; None where it does not answer."""
        try:
            found = read_snapshot(await self.exposition(), time.monotonic())
        except httpx.TransportError as error:
            self.clients.outcomes["lost"] += 1
            self.clients.note(f"metrics: {error!r}")
            return None
        return found.running / NUM_SEATS

    async def send(self, until: float) -> None:
        """Send clients, at random times, until then; wait for the last one."""
        rng = random.Random(SEED)
        async with asyncio.TaskGroup() as group:
            while (now := time.monotonic()) < until:
                await asyncio.sleep(min(rng.expovariate(self.rate), until - now))
                if self.clients.num_in_flight < MAX_IN_FLIGHT:
                    group.create_task(self.clients.one())
                else:
                    self.num_held_back += 1

    async def watch(self, until: float) -> None:
        """Take samples until then, and hold the load."""
        began = before = time.monotonic()
        num_before = 0
        engine_pid = await self.engine_pid()
        while before < until:
            seats: list[float] = []
            for _ in range(LOOKS_A_SAMPLE):
                await asyncio.sleep(SAMPLE_S / LOOKS_A_SAMPLE)
                if (share := await self.share_of_seats()) is not None:
                    seats.append(share)
                    self.rate = followed(self.rate, self.load - share)
            now = time.monotonic()
            num_clients = self.clients.outcomes.total() + self.clients.num_in_flight
            self.samples.append(
                Sample(
                    now - began,
                    fmean(seats or (0.0,)),
                    (num_clients - num_before) / (now - before),
                    self.clients.num_in_flight,
                    footprint(self.server.pid),
                    footprint(engine_pid),
                )
            )
            before, num_before = now, num_clients

    async def engine_pid(self) -> int:
        """Return the engine's process."""
        return await asyncio.to_thread(engine_of, self.server.pid)

    async def rest(self) -> Snapshot:
        """Wait until the server has nothing to do, and keeps nothing for clients who left.

        Raises RuntimeError if it does not come to rest.
        """
        deadline = time.monotonic() + REST_S
        while True:
            text = await self.exposition()
            found = read_snapshot(text, time.monotonic())
            used = found.blocks.get(("device", "used"), 0) + found.blocks.get(("host", "used"), 0)
            num_kept = num_resumable(text)
            if not (found.running or found.waiting or used or num_kept):
                return found
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{found.running + found.waiting} requests, {used} blocks and {num_kept} "
                    "streams are left"
                )
            await asyncio.sleep(0.2)  # another process: there is nothing to wait on


def followed(rate: float, lacking: float) -> float:
    """Return the rate of clients after a look at which the load lacked so much."""
    return rate * exp(GAIN * lacking)


def num_resumable(exposition: str) -> int:
    """Return how many streams are kept."""
    [line] = [
        line for line in exposition.splitlines() if line.startswith("fastserve:resumable_streams{")
    ]
    return int(float(line.rpartition(" ")[2]))


async def soak(server: LiveServer, minutes: float, load: float) -> dict[str, Any]:
    """Keep a server busy, and return what was found."""
    endpoint = Endpoint(server.host, server.port)
    url = f"http://{server.host}:{server.port}"
    # A connection that is kept may be closed by the server just when it is used again.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(
        base_url=url, timeout=60, trust_env=False, limits=limits
    ) as metrics:
        clients = Clients(endpoint, random.Random(SEED))
        one = Soak(server, load, clients, metrics)
        await clients.learn_canaries()
        before = await one.rest()
        idle = [footprint(pid) for pid in (server.pid, await one.engine_pid())]
        until = time.monotonic() + 60 * minutes
        with Progress(transient=True) as progress:
            bar = progress.add_task("soaking", total=60 * minutes)
            async with asyncio.TaskGroup() as group:
                group.create_task(one.send(until))
                watching = group.create_task(one.watch(until))
                while not watching.done():
                    await asyncio.wait((watching,), timeout=1)
                    progress.update(bar, completed=60 * minutes - (until - time.monotonic()))
        after = await one.rest()
        rested = [footprint(pid) for pid in (server.pid, await one.engine_pid())]
    return {
        "minutes": minutes,
        "load_wanted": load,
        "load": round(fmean(sample.load for sample in one.samples), 3),
        "outcomes": dict(sorted(clients.outcomes.items())),
        "faults": {name: clients.outcomes[name] for name in FAULTS},
        "first_faults": clients.faults,
        "times_resumed": clients.num_resumed,
        "clients_held_back": one.num_held_back,
        "totals": {name: after.totals[name] - before.totals[name] for name in COUNTED},
        "memory": memory(one.samples, 60 * minutes * WARM_SHARE),
        "idle": {
            name: {"fds": [a.num_fds, b.num_fds], "threads": [a.num_threads, b.num_threads]}
            for name, a, b in zip(("api", "engine"), idle, rested, strict=True)
        },
        "course": course(one.samples),
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = command_parser("soak", __doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--load", type=float, default=0.9, help="share of the time to be busy")
    parser.add_argument("--output", help="JSON file to write the figures to")
    return parser.parse_args()


def main() -> int:
    """Soak, print, write; the exit status is 1 where there was a fault."""
    args = parse_arguments()
    try:
        if not PROC.is_dir():
            raise ConfigError("memory of processes is read from /proc: Linux only")
        path = None if args.output is None else output_path(args.output)
        with live_process(FLAGS, variables=VARIABLES) as server:
            found = uvloop.run(soak(server, args.minutes, args.load))
        result = {
            **origin("soak"),
            "flags": list(FLAGS),
            "variables": VARIABLES,
            **found,
        }
        if path is not None:
            write_result(path, result)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console().print_json(data={key: found[key] for key in found if key != "course"})
    return 1 if any(found["faults"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
