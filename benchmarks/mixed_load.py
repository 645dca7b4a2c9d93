"""Short requests beside long ones, in wall-clock time: does preempting at every token pay?

    python -m benchmarks.mixed_load [--policies fcfs,skip-join-mlfq] [--low-load] [--trace FILE]

Nine requests in ten want 8-32 tokens, one in ten 800-1,200; with --trace, lengths and clients are a
trace's. No request says how much it wants: it may fill the window, and its client stops reading.
They reach a live server as one seeded Poisson stream, at one rate for every policy: 1.2 × the
measured capacity (0.3 × with --low-load, and a batch that holds everybody). Order: A B B A, for
three policies A B C C B A; each run on a fresh server, after the same warm-up. All servers begin
with the same kernels and step times, and with nothing that one before them learned. JCT counts from
the moment a request was due to its last token wanted. Flags behind `--` go to every server.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import Progress

from benchmarks.command import command_parser, origin
from benchmarks.live_server import LiveServer, copied_cache, live_process
from benchmarks.load_client import Run, measure_capacity, run_workload
from benchmarks.mixed_figures import as_table, describe, ratios
from benchmarks.mixed_workload import (
    LONG_TOKENS,
    SHORT_TOKENS,
    Lengths,
    Workload,
    draw_mix,
    draw_workload,
    trace_lengths,
)
from benchmarks.small_model import NAMED, write_small_model
from fastserve.bench.serve import Target
from fastserve.bench.serve_config import ServeBenchConfig
from fastserve.bench.stream_client import Endpoint
from fastserve.host.provenance import output_path, write_result
from fastserve.host.terminal import print_table
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError

RESULTS = Path("benchmarks/results")


def parse_arguments() -> argparse.Namespace:
    """Read the command line; ConfigError for what cannot be run."""
    parser = command_parser("mixed_load", __doc__)
    parser.add_argument("--policies", default="fcfs,skip-join-mlfq", help="P,P,… to compare")
    parser.add_argument("--low-load", action="store_true", help="0.3 × capacity, a batch of 64")
    parser.add_argument("--trace", type=Path, help="file with lengths, instead of the mix")
    parser.add_argument("--requests", type=int, help="of each run (400; of a trace: 300)")
    parser.add_argument("--long-share", type=float, default=0.1, help="of the mix")
    parser.add_argument("--load", type=float, help="arrival rate over capacity (1.2; low: 0.3)")
    parser.add_argument("--max-num-seqs", type=int, help="of the server (4; low: 64)")
    parser.add_argument(
        "--model", default="demo", help=f"what `serve` takes, or random: {', '.join(NAMED)}"
    )
    parser.add_argument("--capacity", type=float, help="output tokens a second (measured)")
    parser.add_argument("--capacity-seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file (benchmarks/results/mixed_load….json)")
    parser.add_argument("server_flags", nargs="*", metavar="-- FLAG", help="of every server")
    args = parser.parse_args()
    args.policies = args.policies.split(",")
    for policy in args.policies:
        EngineConfig(scheduling_policy=policy)
    if len(set(args.policies)) < len(args.policies):
        raise ConfigError("--policies: one is named twice")
    args.load = args.load or (0.3 if args.low_load else 1.2)
    args.max_num_seqs = args.max_num_seqs or (64 if args.low_load else 4)
    args.requests = args.requests or (300 if args.trace else 400)
    name = "mixed_load" + ("_trace" if args.trace else "") + ("_low" if args.low_load else "")
    args.output = output_path(args.output or str(RESULTS / f"{name}.json"))
    return args


@dataclass(frozen=True, slots=True)
class Bench:
    """The servers under test, and what is asked of them."""

    args: argparse.Namespace
    folder: Path  # for the model and the cache directory that every server begins with

    def flags(self, policy: str) -> list[str]:
        """Return the flags of a server; the folder of a random model is made at need."""
        args = self.args
        model, flags = args.model, list(args.server_flags)
        if model in NAMED:
            model = str(self.folder / args.model)
            flags = ["--load-format", "dummy", *flags]
        flags = ["--scheduling-policy", policy, "--max-num-seqs", str(args.max_num_seqs), *flags]
        return [model, *flags, "--disable-log-requests", "--log-level", "warning"]

    def prepare(self) -> list[Lengths]:
        """Fill the cache directory, and return what is asked for, cut to the model's window."""
        args = self.args
        if args.model in NAMED:
            (self.folder / args.model).mkdir()
            write_small_model(self.folder / args.model, NAMED[args.model])
        with live_process(self.flags(args.policies[0]), self.warm) as server:
            if args.trace is None:
                return draw_mix(args.seed, args.requests, args.long_share)
            return trace_lengths(args.trace, args.requests, window_of(server))

    @property
    def warm(self) -> Path:
        """The cache directory of a server that was asked nothing."""
        return self.folder / "cache"

    @contextmanager
    def server(self, policy: str) -> Iterator[Endpoint]:
        """Run a fresh server and yield its address."""
        with copied_cache(self.warm) as cache, live_process(self.flags(policy), cache) as server:
            yield Endpoint(server.host, server.port)

    def capacity(self, lengths: Sequence[Lengths]) -> float:
        """Measure the output tokens a second under the first policy."""
        args = self.args
        with self.server(args.policies[0]) as endpoint:
            in_flight, seconds = 2 * args.max_num_seqs, args.capacity_seconds
            return uvloop.run(measure_capacity(endpoint, args.seed, lengths, in_flight, seconds))

    def runs(self, workload: Workload, console: Console) -> Iterator[tuple[str, Run]]:
        """Yield every policy's run, there and back."""
        args = self.args
        with Progress(console=console, refresh_per_second=1) as progress:
            for policy in [*args.policies, *reversed(args.policies)]:
                bar = progress.add_task(policy, total=len(workload.requests))
                advance = functools.partial(progress.advance, bar)
                with self.server(policy) as endpoint:
                    run = uvloop.run(run_workload(endpoint, args.seed, workload, advance))
                if not run.timings:
                    raise ConfigError(f"all requests were lost under {policy}: {run.lost[0]}")
                yield policy, run


def window_of(server: LiveServer) -> int:
    """Return the most tokens that a request of this server may have."""
    window = Target(ServeBenchConfig(host=server.host, port=server.port)).window
    assert window is not None, "a FastServe server says it"
    return window


def measure(args: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Measure the capacity, run all policies and return the result."""
    bench = Bench(args, folder)
    console.print("Filling the cache directory …")
    lengths = bench.prepare()
    capacity = args.capacity
    if capacity is None:
        console.print(f"Capacity under {args.policies[0]}, {args.capacity_seconds:g} s …")
        capacity = bench.capacity(lengths)
    mean_tokens = fmean(each.output for each in lengths)
    rate = args.load * capacity / mean_tokens
    seconds = len(lengths) * mean_tokens / capacity * max(1.0, 1.0 / args.load)
    console.print(
        f"Capacity {capacity:,.0f} output tokens/s; load {args.load:g} = {rate:.2f} requests/s "
        f"of {mean_tokens:.0f} tokens; {2 * len(args.policies)} runs of about {seconds:.0f} s"
    )
    runs = list(bench.runs(draw_workload(args.seed, lengths, rate), console))
    for policy, run in runs:
        for error in run.lost[:5]:
            console.print(f"[red]lost under {policy}:[/] {error}")
    is_mix = args.trace is None
    mix = {"long_share": args.long_share, "short": SHORT_TOKENS, "long": LONG_TOKENS}
    policies = [
        describe(policy, [run for name, run in runs if name == policy], is_mix=is_mix)
        for policy in args.policies
    ]
    return {
        **origin("mixed_load"),
        "server_flags": {policy: bench.flags(policy) for policy in args.policies},
        "seed": args.seed,
        "requests": len(lengths),
        "lengths": mix if is_mix else args.trace.name,
        "capacity_tokens_per_s": capacity,
        "load": args.load,
        "requests_per_s": rate,
        "ratios": {each["policy"]: ratios(policies[0], each) for each in policies[1:]},
        "policies": policies,
        "runs": [describe(policy, [run], is_mix=is_mix) for policy, run in runs],
    }


def show(result: dict[str, Any]) -> None:
    """Print the figures."""
    load = f"{result['requests']} requests, {result['load']:g} × capacity"
    print_table(as_table(result["policies"], f"{load}, both runs of each policy"))
    means = ", ".join(f"{run['policy']} {run['jct_s']['mean']:.3f}" for run in result["runs"])
    print(f"mean JCT by run: {means}")
    first = result["policies"][0]["policy"]
    for policy, found in result["ratios"].items():
        jct = ", ".join(f"{name} {value:.2f}" for name, value in found["jct_s"].items())
        print(f"JCT, {first} / {policy}: {jct}")


def main() -> int:
    """Measure, print, write; exit code 1 if a request was lost, 2 for a run that cannot be."""
    try:
        args = parse_arguments()
        with tempfile.TemporaryDirectory() as folder:
            result = measure(args, Path(folder), Console(stderr=True))
        write_result(args.output, result)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(result)
    print(f"written to {args.output}")
    return 1 if any(each["lost"] for each in result["policies"]) else 0


if __name__ == "__main__":
    sys.exit(main())
