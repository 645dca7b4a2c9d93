"""Short requests beside long ones, in wall-clock time: does preempting at every token pay?

    python -m benchmarks.mixed_load [--low-load]

Nine requests in ten ask for 8-32 tokens, one in ten for 800-1,200. They reach a live server as one
seeded Poisson stream, at one rate for both policies: 1.2 × the measured capacity (0.3 × with
--low-load, and a batch that holds everybody). Order: baseline, policy, policy, baseline, each on a
fresh server after the same warm-up. JCT counts from the moment a request was due.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import uvloop
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from benchmarks.live_server import live_server
from benchmarks.mixed_workload import (
    LONG_TOKENS,
    SHORT_TOKENS,
    Ask,
    Workload,
    draw_requests,
    draw_workload,
    is_short,
)
from fastserve.bench.stream_client import Endpoint, LostRequestError, ask, fields_of
from fastserve.host.provenance import provenance
from fastserve.sim.measures import Times, summary

Address = tuple[str, int]
WARM_UP_REQUESTS = 12
RAMP_SECONDS = 5.0


class Timing(NamedTuple):
    """One answered request, in seconds of one clock; the fields of Times."""

    arrived_at: float
    first_token_at: float
    finished_at: float
    max_gap_s: float
    output_tokens: int


def report(timings: Sequence[Timing]) -> dict[str, dict[str, float | None]]:
    """Return a summary of each measure."""
    columns = zip(Timing._fields, map(np.array, zip(*timings, strict=True)), strict=True)
    return {name: summary(values) for name, values in Times(**dict(columns)).latencies().items()}


@dataclass(frozen=True, slots=True)
class Run:
    """One policy under the workload."""

    policy: str
    timings: list[Timing]
    lost: list[str]
    makespan_s: float
    client_lateness_s: float  # the most that a request was sent after it was due


async def answered(
    address: Address, request: Ask, due: float, on_piece: Callable[[], None] = lambda: None
) -> Timing:
    """Send one request and return its times, from the moment it was due."""
    fields = fields_of(request.prompt, request.num_output_tokens)
    answer = await ask(Endpoint(*address), fields, on_piece)
    times = answer.piece_times
    longest = max((later - sooner for sooner, later in pairwise(times)), default=0.0)
    return Timing(due, times[0], times[-1], longest, answer.output_tokens)


async def warm_up(address: Address, seed: int) -> None:
    """Answer a few short requests and forget them."""
    rng = random.Random(seed + 1)
    shorts = draw_requests(rng, WARM_UP_REQUESTS, long_share=0.0)
    await asyncio.gather(*(answered(address, request, time.perf_counter()) for request in shorts))


async def measure_capacity(
    address: Address, seed: int, long_share: float, in_flight: int, seconds: float
) -> float:
    """Return output tokens a second with always `in_flight` requests of the mix in the server."""
    await warm_up(address, seed)
    rng = random.Random(seed + 2)
    pieces = done_pieces = done_tokens = 0

    async def client() -> None:
        nonlocal pieces, done_pieces, done_tokens
        while True:
            for request in draw_requests(rng, 10, long_share):
                mine = 0

                def count() -> None:
                    nonlocal pieces, mine
                    pieces += 1
                    mine += 1

                await answered(address, request, time.perf_counter(), count)
                done_pieces += mine
                done_tokens += request.num_output_tokens

    clients = [asyncio.create_task(client()) for _ in range(in_flight)]
    await asyncio.wait(clients, timeout=RAMP_SECONDS, return_when=asyncio.FIRST_EXCEPTION)
    started, before = time.perf_counter(), pieces
    await asyncio.wait(clients, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    elapsed, counted = time.perf_counter() - started, pieces - before
    for task in clients:
        task.cancel()
    for outcome in await asyncio.gather(*clients, return_exceptions=True):
        if not isinstance(outcome, asyncio.CancelledError):
            raise RuntimeError("a client of the capacity run ended") from outcome
    # A piece of text may stand for several tokens: whole answers tell how many on average.
    return counted * done_tokens / done_pieces / elapsed


async def run_workload(
    address: Address, policy: str, workload: Workload, progress: Progress, bar: TaskID
) -> Run:
    """Send every request when it is due and wait for every answer."""
    timings: list[Timing] = []
    lost: list[str] = []
    lateness = 0.0
    start = time.perf_counter()

    async def client(request: Ask, due: float) -> None:
        try:
            timings.append(await answered(address, request, due))
        except (LostRequestError, OSError) as error:
            lost.append(f"{type(error).__name__}: {error}")
        progress.advance(bar)

    async with asyncio.TaskGroup() as group:
        for request, due_s in zip(workload.requests, workload.due_s, strict=True):
            due = start + due_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            lateness = max(lateness, time.perf_counter() - due)
            group.create_task(client(request, due))
    return Run(policy, timings, lost, time.perf_counter() - start, lateness)


def describe(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the figures of one run, or of several of one policy taken together."""
    timings = [timing for run in runs for timing in run.timings]
    shorts = [timing for timing in timings if is_short(timing.output_tokens)]
    longs = [timing for timing in timings if not is_short(timing.output_tokens)]
    tokens = sum(timing.output_tokens for timing in timings)
    return {
        "policy": runs[0].policy,
        "requests": len(timings),
        "lost": sum(len(run.lost) for run in runs),
        "tokens_per_s": tokens / sum(run.makespan_s for run in runs),
        "makespan_s": [run.makespan_s for run in runs],
        "client_lateness_s": max(run.client_lateness_s for run in runs),
        **report(timings),
        "short": report(shorts) if shorts else None,
        "long": report(longs) if longs else None,
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mixed_load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--low-load", action="store_true", help="0.3 × capacity, a batch of 64")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--long-share", type=float, default=0.1)
    parser.add_argument("--load", type=float, help="arrival rate over capacity (1.2; low: 0.3)")
    parser.add_argument("--max-num-seqs", type=int, help="of the server (4; low: 64)")
    parser.add_argument("--baseline", default="fcfs")
    parser.add_argument("--policy", default="skip-join-mlfq")
    parser.add_argument("--starvation-limit", type=float, help="of the server (its default)")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--capacity", type=float, help="output tokens a second (measured)")
    parser.add_argument("--capacity-seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file (benchmarks/results/…)")
    args = parser.parse_args()
    args.load = args.load or (0.3 if args.low_load else 1.2)
    args.max_num_seqs = args.max_num_seqs or (64 if args.low_load else 4)
    name = "mixed_load_low.json" if args.low_load else "mixed_load.json"
    args.output = args.output or Path("benchmarks/results") / name
    return args


def server_flags(args: argparse.Namespace, policy: str) -> list[str]:
    """Return the flags of the server under test."""
    flags = [args.model, "--scheduling-policy", policy, "--max-num-seqs", str(args.max_num_seqs)]
    if args.starvation_limit is not None:
        flags += ["--starvation-limit", str(args.starvation_limit)]
    return [*flags, "--disable-log-requests", "--log-level", "warning"]


def run_all(args: argparse.Namespace, console: Console) -> tuple[float, float, list[Run]]:
    """Return the capacity, the arrival rate and the four runs."""
    capacity = args.capacity
    if capacity is None:
        console.print(f"Measuring capacity under {args.baseline} ({args.capacity_seconds:g} s) …")
        with live_server(server_flags(args, args.baseline)) as address:
            capacity = uvloop.run(
                measure_capacity(
                    address,
                    args.seed,
                    args.long_share,
                    2 * args.max_num_seqs,
                    args.capacity_seconds,
                )
            )
    requests = draw_workload(args.seed, args.requests, args.long_share, 1.0).requests
    mean_tokens = fmean(request.num_output_tokens for request in requests)
    rate = args.load * capacity / mean_tokens
    console.print(
        f"Capacity {capacity:,.0f} output tokens/s; load {args.load:g} = {rate:.2f} requests/s "
        f"of {mean_tokens:.0f} tokens"
    )
    workload = draw_workload(args.seed, args.requests, args.long_share, rate)

    async def one_run(address: Address, policy: str, progress: Progress, bar: TaskID) -> Run:
        await warm_up(address, args.seed)
        return await run_workload(address, policy, workload, progress, bar)

    runs = []
    with Progress(console=console, refresh_per_second=1) as progress:
        for policy in (args.baseline, args.policy, args.policy, args.baseline):
            bar = progress.add_task(policy, total=args.requests)
            with live_server(server_flags(args, policy)) as address:
                runs.append(uvloop.run(one_run(address, policy, progress, bar)))
    return capacity, rate, runs


def as_table(figures: Sequence[dict[str, Any]], title: str) -> Table:
    """Lay figures out for people, one column a policy."""
    table = Table("seconds", *(each["policy"] for each in figures), title=title)
    for heading, group in (("", None), ("short: ", "short"), ("long: ", "long")):
        for measure, names in (
            ("jct_s", ("mean", "p50", "p95", "p99")),
            ("normalized_latency_s", ("mean", "p99")),
            ("ttft_s", ("mean", "p99")),
            ("max_gap_s", ("max",)),
        ):
            for name in names:
                rows = [each[group] if group else each for each in figures]
                cells = [f"{row[measure][name]:.3f}" if row else "-" for row in rows]
                label = f"{heading}{measure.removesuffix('_s').replace('_', ' ')} {name}"
                table.add_row(label, *cells, end_section=(measure, name) == ("max_gap_s", "max"))
    table.add_row("output tokens/s", *(f"{each['tokens_per_s']:.0f}" for each in figures))
    table.add_row("lost requests", *(str(each["lost"]) for each in figures))
    return table


def main() -> int:
    """Measure, print, write; exit code 1 if a request was lost."""
    args = parse_arguments()
    console = Console(stderr=True)
    capacity, rate, runs = run_all(args, console)
    for run in runs:
        for error in run.lost[:5]:
            console.print(f"[red]lost under {run.policy}:[/] {error}")
    if not all(run.timings for run in runs):
        return 1
    of_policy = {
        policy: describe([run for run in runs if run.policy == policy])
        for policy in (args.baseline, args.policy)
    }
    before, after = of_policy[args.baseline], of_policy[args.policy]
    ratio = before["jct_s"]["mean"] / after["jct_s"]["mean"]
    result = {
        "benchmark": "mixed_load",
        **provenance(["python", "-m", "benchmarks.mixed_load", *sys.argv[1:]]),
        "server_flags": {policy: server_flags(args, policy) for policy in of_policy},
        "seed": args.seed,
        "requests": args.requests,
        "long_share": args.long_share,
        "output_tokens": {"short": SHORT_TOKENS, "long": LONG_TOKENS},
        "capacity_tokens_per_s": capacity,
        "load": args.load,
        "requests_per_s": rate,
        "mean_jct_ratio": ratio,
        "policies": list(of_policy.values()),
        "runs": [describe([run]) for run in runs],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    title = f"{args.requests} requests, {args.load:g} × capacity, both runs of each policy"
    Console().print(as_table([before, after], title))
    means = ", ".join(f"{run['policy']} {run['jct_s']['mean']:.2f}" for run in result["runs"])
    print(f"mean JCT by run: {means}")
    print(f"mean JCT, {args.baseline} / {args.policy}: {ratio:.2f}    written to {args.output}")
    return 1 if before["lost"] or after["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
