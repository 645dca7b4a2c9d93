"""What faults of a live server cost its clients: engines that are killed or stopped, and SIGTERM.

    python -m benchmarks.faults [--faults 20] [--streams 100] [--kinds kill,stop,term]

kill, stop: SIGKILL or SIGSTOP to the engine process while all streams are open and have begun. Ids
are held against those of the same requests undisturbed, under `--deterministic`, which promises the
same bits in any batch. A server has as many faults as it allows in a minute, then comes another.
Recovery counts from the fault to the first token of any stream after it, and to the moment at which
each stream that was open has had one.
term: SIGTERM under a load of streams, whole answers and new arrivals, half of the servers with time
to finish, half without. Each request must end whole, with one error event and [DONE], or with a
503; the status must say whether any was cut off.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.command import command_parser, names_of, origin, run_command
from benchmarks.fault_clients import Clients, Stream, body_of
from benchmarks.live_server import STOP_SECONDS, LiveServer, live_process
from benchmarks.process_cpu import engine_of
from fastserve.client.supervisor import MAX_RESTARTS
from fastserve.host.provenance import output_path

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
KINDS = (*SIGNALS, "term")
QUIET_S = 0.5  # what comes sooner after a fault was on its way
LONG_TOKENS, SHORT_TOKENS = 64, 24
PATIENT_S, HASTY_S = 60.0, 0.5  # --shutdown-timeout
FLAGS = ("demo", "--num-threads", "1", "--deterministic", "--max-num-seqs", "128",
         "--log-level", "warning")  # fmt: skip


def bodies(count: int) -> list[dict[str, Any]]:
    """Return requests, greedy ones and drawn ones."""
    return [body_of(seed, LONG_TOKENS, temperature=seed % 2) for seed in range(count)]


async def undisturbed(server: LiveServer, count: int) -> list[list[int]]:
    """Return the ids of each request where nothing happens to it."""
    async with Clients(server) as clients:
        streams = [clients.open(body) for body in bodies(count)]
        await clients.ended(streams)
        return [stream.ids for stream in streams]


async def disturbed(server: LiveServer, kind: str, expected: Sequence[list[int]]) -> dict[str, Any]:
    """Run all requests, do the engine harm once each has begun, and return what it cost."""
    async with Clients(server) as clients:
        streams = [clients.open(body) for body in bodies(len(expected))]
        await clients.until(lambda: all(stream.times for stream in streams))
        engine = engine_of(server.pid)
        fault_at = time.monotonic()
        os.kill(engine, SIGNALS[kind])
        num_open = sum(not stream.end for stream in streams)
        not_ready = await clients.seen_unready()
        await clients.ended(streams)
        quiet_until = fault_at + QUIET_S
        resumed = [first - fault_at for s in streams if (first := s.first_after(quiet_until))]
    return {
        "open": num_open,
        "resumed": len(resumed),
        "first_s": min(resumed),
        "all_s": max(resumed),
        "not_ready_after_s": not_ready.at - fault_at,
        "health_meanwhile": not_ready.health,
        "differing": sum(s.ids != ids for s, ids in zip(streams, expected, strict=True)),
        "not_whole": sum(stream.end != "whole" for stream in streams),
    }


def harm_engines(kind: str, num_faults: int, num_streams: int) -> dict[str, Any]:
    """Do so much harm of one kind and sum up."""
    rounds: list[dict[str, Any]] = []
    while len(rounds) < num_faults:
        with live_process(FLAGS) as server:
            expected = asyncio.run(undisturbed(server, num_streams))
            for _ in range(min(MAX_RESTARTS, num_faults - len(rounds))):
                rounds.append(asyncio.run(disturbed(server, kind, expected)))
                say(kind, len(rounds), rounds[-1])
    return {
        "faults": len(rounds),
        "streams_open": sum(one["open"] for one in rounds),
        "streams_not_whole": sum(one["not_whole"] for one in rounds),
        "streams_with_other_ids": sum(one["differing"] for one in rounds),
        "recovery_first_s": spread([one["first_s"] for one in rounds]),
        "recovery_all_s": spread([one["all_s"] for one in rounds]),
        "not_ready_after_s": spread([one["not_ready_after_s"] for one in rounds]),
        "health_meanwhile": sorted({one["health_meanwhile"] for one in rounds}),
    }


async def terminated(server: LiveServer, num_streams: int) -> Counter[str]:
    """Send SIGTERM under load and return how each request ended."""
    async with Clients(server) as clients:
        streams: list[Stream] = []

        def arrive(count: int) -> None:
            for _ in range(count):
                seed = len(streams)
                body = body_of(seed, SHORT_TOKENS, temperature=1)
                streams.append(clients.open(body | {"stream": seed % 4 != 3}))

        arrive(num_streams)
        begun_at = num_streams // 2
        await clients.until(lambda: sum(bool(stream.times) for stream in streams) >= begun_at)
        arrive(num_streams // 4)
        os.kill(server.pid, signal.SIGTERM)
        arrive(num_streams // 4)
        await clients.ended(streams)
    return Counter(stream.end for stream in streams)


def terminate_servers(num_faults: int, num_streams: int) -> dict[str, Any]:
    """End as many servers by SIGTERM and sum up."""
    ends: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    num_wrong = 0
    for number in range(num_faults):
        limit_s = HASTY_S if number % 2 else PATIENT_S
        with live_process((*FLAGS, "--shutdown-timeout", str(limit_s))) as server:
            found = asyncio.run(terminated(server, num_streams))
            status = server.process.wait(STOP_SECONDS)
        is_cut_off = found["error shutting_down"] > 0
        num_wrong += status != (128 + signal.SIGTERM if is_cut_off else 0)
        ends += found
        statuses[f"{limit_s:g} s: {status}"] += 1
        say("term", number + 1, {**found, "status": status})
    answered = {"whole", "error shutting_down", "503 shutting_down", "refused"}
    return {
        "servers": num_faults,
        "requests": sum(ends.values()),
        "ends": dict(sorted(ends.items())),
        "broken_off": sum(count for end, count in ends.items() if end not in answered),
        "statuses": dict(sorted(statuses.items())),
        "wrong_statuses": num_wrong,
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the extremes."""
    found = {"p50": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    return {name: round(value, 2) for name, value in found.items()}


def say(kind: str, number: int, found: dict[str, Any]) -> None:
    """Print what one fault came to."""
    shown = {k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()}
    print(kind, number, shown, flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; ConfigError for what cannot be run."""
    parser = command_parser("faults", __doc__)
    parser.add_argument("--faults", type=int, default=20, help="of each kind")
    parser.add_argument("--streams", type=int, default=100, help="that are open at each")
    parser.add_argument("--kinds", default=",".join(KINDS), help="names, with commas")
    parser.add_argument("--output", help="JSON file to write the figures to")
    args = parser.parse_args()
    args.kinds = names_of("--kinds", args.kinds, KINDS)
    args.output = None if args.output is None else output_path(args.output)
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do harm of each kind."""
    result: dict[str, Any] = {
        **origin("faults"),
        "load_average_at_start": [round(load, 1) for load in os.getloadavg()],
        "flags": list(FLAGS),
        "streams": args.streams,
    }
    for kind in args.kinds:
        result[kind] = (
            terminate_servers(args.faults, args.streams)
            if kind == "term"
            else harm_engines(kind, args.faults, args.streams)
        )
    result["load_average_at_end"] = [round(load, 1) for load in os.getloadavg()]
    return result


def show(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Print what each kind came to."""
    for kind in args.kinds:
        print(kind, result[kind])


def main() -> int:
    """Do harm, write, print; exit code 2 for a run that cannot be."""
    return run_command(parse_arguments, run, show)


if __name__ == "__main__":
    sys.exit(main())
