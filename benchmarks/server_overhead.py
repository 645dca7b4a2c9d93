"""What HTTP, text and a second process cost: a live server beside the same engine without them.

    python -m benchmarks.server_overhead [--model DIR] [--threads 1] [--streams 32] [--rounds 5]

Both take turns, in this order: offline, server, server, offline, and so on, each after one round
to warm up: what drifts in the machine's speed meets both. Equal threads, limits of a step, lengths
and number of requests, all of which arrive together; bfloat16, random weights. Offline is the
engine of `fastserve bench offline` in a process of its own, the server's client is that of
`fastserve bench serve`, in this process. Ratios are server / offline, formed in each round.

What the figures mean: benchmarks/overhead_figures.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import Progress

from benchmarks.command import command_parser, origin
from benchmarks.live_server import LiveServer, live_process
from benchmarks.overhead_figures import (
    SHARES,
    SPEEDS,
    Figures,
    Round,
    as_table,
    decode_speed,
    pieces_per_token,
    ratios,
    run_rounds,
    summary,
)
from benchmarks.process_cpu import PROC, cpu_seconds, engine_of
from benchmarks.small_model import write_small_model
from fastserve.bench.config import OfflineBenchConfig
from fastserve.bench.offline import Offline, check_fits, with_room
from fastserve.bench.requests import plan_requests
from fastserve.bench.serve import Target, send
from fastserve.bench.serve_config import ServeBenchConfig
from fastserve.bench.serve_report import Run, Sent, figures
from fastserve.host.garbage_collector import quiet_garbage_collector
from fastserve.host.json_file import read_object
from fastserve.host.provenance import output_path
from fastserve.host.terminal import print_table
from fastserve.launch.engine import open_engine
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.text.tokenizer import Tokenizer

STOP_SECONDS = 30.0


def run_offline(
    connection: multiprocessing.connection.Connection,
    bench: OfflineBenchConfig,
    config: EngineConfig,
) -> None:
    """Be the process of the offline engine: say the size of the vocabulary, then run on demand."""
    try:
        engine, info = open_engine(config)
        with contextlib.closing(engine):
            check_fits(bench, info)
            quiet_garbage_collector()  # as the engine process does
            connection.send(info.vocab_size)
            answer_calls(connection, bench, Offline(engine, info, config.seed))
    except ConfigError as error:
        connection.send(error)


def answer_calls(
    connection: multiprocessing.connection.Connection, bench: OfflineBenchConfig, offline: Offline
) -> None:
    """Run one batch for each message, until nobody asks for more."""
    [streams] = bench.batch_sizes()
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        started, cpu = time.perf_counter(), time.process_time()
        speed = offline.decode(streams, bench.input_len, bench.output_len)
        share = (time.process_time() - cpu) / (time.perf_counter() - started)
        values = (speed.total_tokens_per_s, speed.tokens_per_s, speed.step_ms_p50)
        connection.send({**dict(zip(SPEEDS, values, strict=True)), "engine": share})


@contextlib.contextmanager
def offline_engine(
    bench: OfflineBenchConfig, config: EngineConfig
) -> Iterator[tuple[int, Callable[[], Figures]]]:
    """Load the engine in a process of its own; yield the vocabulary's size and what runs it once.

    Raises ConfigError for what the engine refuses.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_offline, args=(theirs, bench, config), daemon=True)
    process.start()
    theirs.close()

    def answer() -> Any:
        try:
            received = ours.recv()
        except EOFError:
            raise RuntimeError("the process of the offline engine died") from None
        if isinstance(received, ConfigError):
            raise received
        return received

    def measure() -> Figures:
        ours.send(None)
        speed: Figures = answer()
        return speed

    try:
        yield answer(), measure
    finally:
        ours.close()
        process.join(STOP_SECONDS)


def server_flags(config: EngineConfig) -> list[str]:
    """Return the flags with which a server's engine gets the same settings."""
    flags = [config.model, "--disable-log-requests", "--log-level", "warning"]
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if spec.name != "model" and value != spec.default:
            flags += ["--" + spec.name.replace("_", "-"), str(value)]
    return flags


def measure_server(server: LiveServer, engine_pid: int, bench: ServeBenchConfig) -> Figures:
    """Send the requests of one round and wait for every answer.

    Raises RuntimeError when one is lost.
    """
    target, requests = Target(bench), plan_requests(bench)

    def cpu() -> tuple[float, float, float]:
        return cpu_seconds([server.pid]), cpu_seconds([engine_pid]), time.process_time()

    async def exchange() -> tuple[list[Sent], float, list[float]]:
        started, before = time.perf_counter(), cpu()
        sent = await send(target, requests, lambda: None)
        after, seconds = cpu(), time.perf_counter() - started
        return sent, seconds, [b - a for a, b in zip(before, after, strict=True)]

    sent, seconds, cpu_s = uvloop.run(exchange())
    answers = [one.answer for one in sent if one.answer is not None]
    if len(answers) < len(sent):
        errors = sorted({one.error for one in sent if one.error is not None})
        raise RuntimeError(f"requests were lost: {errors[0]}")
    found = figures(Run(sent, seconds, cpu_s[2], ()), bench)
    speeds = (found["output_throughput"], decode_speed(answers), found["median_itl_ms"])
    return {
        **dict(zip(SPEEDS, speeds, strict=True)),
        **{name: used / seconds for name, used in zip(SHARES, cpu_s, strict=True)},
        "mean_ttft_ms": found["mean_ttft_ms"],
        "pieces_per_token": pieces_per_token(answers),
    }


def measure(
    bench: OfflineBenchConfig, config: EngineConfig, rounds: int, streams_ids: bool
) -> list[Round]:
    """Start both and let them take turns."""
    console = Console(stderr=True)
    [streams] = bench.batch_sizes()
    found = []
    with Progress(console=console, transient=True, refresh_per_second=1) as progress:
        bar = progress.add_task("loading", total=1 + rounds)
        with (
            offline_engine(bench, config) as (vocab_size, offline),
            live_process(server_flags(config)) as server,
        ):
            engine_pid = engine_of(server.pid)

            def serve(number: int) -> Figures:
                serving = ServeBenchConfig(
                    host=server.host,
                    port=server.port,
                    num_prompts=streams,
                    random_input_len=bench.input_len,
                    random_output_len=bench.output_len,
                    random_vocab_size=vocab_size,
                    seed=number,  # prompts that no cache knows
                    extra_body='{"return_token_ids": true}' if streams_ids else None,
                )
                return measure_server(server, engine_pid, serving)

            for one in run_rounds(rounds, offline, serve):
                found.append(one)
                progress.update(bar, advance=1, description="measuring")
    return found[1:]


def positive(text: str) -> int:
    """Read a number from 1."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = command_parser("server_overhead", __doc__)
    parser.add_argument("--model", help="directory with a config.json (a Llama of 17M parameters)")
    parser.add_argument("--threads", type=positive, default=1, help="of the engine, in both")
    parser.add_argument("--streams", type=positive, default=32, help="requests that run together")
    parser.add_argument("--input-len", type=positive, default=128)
    parser.add_argument("--output-len", type=positive, default=128)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--output", help="JSON file to write the figures to")
    return parser.parse_args()


def run(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Measure the model in a directory and return the result."""
    bench = OfflineBenchConfig(
        input_len=args.input_len,
        output_len=args.output_len,
        batch_size=str(args.streams),
        prefill_len=args.input_len,
    )
    config = with_room(
        bench,
        EngineConfig(
            model=str(directory), load_format="dummy", dtype="bfloat16", num_threads=args.threads
        ),
    )
    # A tokenizer may hold back an id that ends inside a character, and random weights may say no
    # other: what has no text could not be timed. The small model's ids all have text.
    streams_ids = args.model is not None
    rounds = measure(bench, config, args.rounds, streams_ids)
    return {
        **origin("server_overhead"),
        "model": read_object(directory / "config.json"),
        "has_text": Tokenizer.is_in(directory),
        "streams_ids": streams_ids,
        "dtype": config.dtype,
        "threads": config.num_threads,
        "streams": args.streams,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "median": summary(rounds),
        "rounds": [{**one._asdict(), "ratios": ratios(one)} for one in rounds],
    }


def main() -> int:
    """Measure, print, write."""
    args = parse_arguments()
    try:
        if not PROC.is_dir():
            raise ConfigError("processor time of processes is read from /proc: Linux only")
        path = None if args.output is None else output_path(args.output)
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(args.model or temporary)
            if args.model is None:
                write_small_model(directory)
            elif not (directory / "config.json").is_file():
                raise ConfigError(f"--model {args.model}: no directory with a config.json")
            result = run(args, directory)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(as_table(result))
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
