"""What KV that is there already is worth: time to first token on a live server.

    python -m benchmarks.prefix_cache [--model llama-125m] [--rounds 5] [--only shared]

shared: a system prompt of 1,000 tokens, new in each round, before two questions of 20 tokens: the
first question has it computed, the second finds it. conversation: ten turns, each 100 tokens behind
all that was said before and an answer of 60; between turns other prompts, 1.5 times the device's
pool, take the KV's places. With a host tier a turn brings its beginning back, without one it
computes it anew. The two servers run beside each other and take turns, round by round: A B B A …;
a round's conversation is the same for both. One request at a time, ids as prompts, greedy. Medians
over rounds; a ratio is of medians, above 1 what is cached answers so many times sooner. Flags
behind `--` go to every server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress

from benchmarks.command import command_parser, origin, run_command
from benchmarks.live_server import copied_cache, live_process
from benchmarks.mixed_workload import NUM_IDS
from benchmarks.small_model import NAMED, write_small_model
from fastserve.host.http_client import open_client
from fastserve.host.provenance import output_path

RESULT = "benchmarks/results/prefix_cache.json"
SECONDS = 120.0  # of one answer

SHARED_TOKENS, QUESTION_TOKENS, SHORT_ANSWER = 1000, 20, 4
NUM_TURNS, TURN_TOKENS, ANSWER_TOKENS = 10, 100, 60
NUM_BLOCKS, BLOCK_SIZE = 128, 16  # of the conversation's servers: one window
OTHER_TOKENS, OTHERS_PER_TURN = 1024, 3

ARMS: Mapping[str, Sequence[str]] = {
    "host tier": ("--preemption-mode", "proactive", "--swap-space", "1"),
    "device only": ("--swap-space", "0"),
}


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer: when its first token came, what of its prompt was cached, its ids."""

    ttft_s: float
    cached_tokens: int
    token_ids: list[int]


def ask(client: httpx.Client, prompt: Sequence[int], num_tokens: int) -> Reply:
    """Read one answer of so many tokens; httpx.HTTPError or ValueError if it is lost."""
    body = {
        "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0.0,
        "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True,
    }  # fmt: skip
    sent_at = time.perf_counter()
    ttft_s, cached, ids = 0.0, 0, list[int]()
    with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ValueError(event["error"]["message"])
            for choice in event["choices"]:
                ttft_s = ttft_s or time.perf_counter() - sent_at
                ids += choice["token_ids"]
            if event["usage"] is not None:
                cached = event["usage"]["prompt_tokens_details"]["cached_tokens"]
    if len(ids) != num_tokens:
        raise ValueError(f"{len(ids)} of {num_tokens} tokens came")
    return Reply(ttft_s, cached, ids)


def drawn(rng: random.Random, num_tokens: int) -> list[int]:
    """Return ids that no other prompt has in this order."""
    return rng.choices(range(NUM_IDS), k=num_tokens)


def two_questions(client: httpx.Client, rng: random.Random) -> list[Reply]:
    """Ask two questions behind one new system prompt."""
    system = drawn(rng, SHARED_TOKENS)
    return [ask(client, system + drawn(rng, QUESTION_TOKENS), SHORT_ANSWER) for _ in range(2)]


def conversation(client: httpx.Client, rng: random.Random) -> list[Reply]:
    """Have a conversation whose KV loses its places on the device before each turn."""
    said: list[int] = []
    replies = []
    for _ in range(NUM_TURNS):
        for _ in range(OTHERS_PER_TURN):
            ask(client, drawn(rng, OTHER_TOKENS), 1)
        said += drawn(rng, TURN_TOKENS)
        replies.append(ask(client, said, ANSWER_TOKENS))
        said += replies[-1].token_ids
    return replies


@dataclass(frozen=True, slots=True)
class Bench:
    """The servers under test."""

    args: argparse.Namespace
    folder: Path  # for the model and the cache directory that every server begins with

    def flags(self, *own: str) -> list[str]:
        """Return the flags of a server."""
        model, flags = self.args.model, [*own, *self.args.server_flags]
        if model in NAMED:
            model, flags = str(self.folder / model), ["--load-format", "dummy", *flags]
        return [model, *flags, "--disable-log-requests", "--log-level", "warning"]

    def arm_flags(self, arm: str) -> list[str]:
        """Return the flags of a server of the conversation."""
        sizes = ("--num-device-blocks", str(NUM_BLOCKS), "--block-size", str(BLOCK_SIZE))
        return self.flags(*sizes, *ARMS[arm])

    def prepare(self) -> None:
        """Make the model and fill the cache directory: kernels and step times."""
        if self.args.model in NAMED:
            (self.folder / self.args.model).mkdir()
            write_small_model(self.folder / self.args.model, NAMED[self.args.model])
        with live_process(self.flags(), self.folder / "cache"):
            pass

    @contextlib.contextmanager
    def server(self, flags: Sequence[str]) -> Iterator[httpx.Client]:
        """Run a fresh server, warm it up and yield a client of it."""
        with contextlib.ExitStack() as stack:
            cache = stack.enter_context(copied_cache(self.folder / "cache"))
            server = stack.enter_context(live_process(flags, cache))
            url = f"http://{server.host}:{server.port}"
            client = stack.enter_context(open_client(url, timeout_s=SECONDS, is_direct=True))
            client.base_url = httpx.URL(url)
            two_questions(client, random.Random("warm-up"))
            yield client

    def shared(self, progress: Progress) -> dict[str, Any]:
        """Measure the second question behind a system prompt over the first."""
        flags = self.flags()
        with self.server(flags) as client:
            rounds = [
                two_questions(client, random.Random(f"{self.args.seed} {number}"))
                for number in progress.track(range(self.args.rounds), description="shared")
            ]
        columns = list(zip(*rounds, strict=True))
        first, second = (described(replies) for replies in columns)
        return {
            "server_flags": flags,
            "prompt_tokens": {"shared": SHARED_TOKENS, "own": QUESTION_TOKENS},
            "first": first,
            "second": second,
            "ttft_ratio": first["median_ttft_s"] / second["median_ttft_s"],
        }

    def conversations(self, progress: Progress) -> dict[str, Any]:
        """Measure the turns of conversations with a host tier over those without."""
        found: dict[str, list[list[Reply]]] = {arm: [] for arm in ARMS}
        with contextlib.ExitStack() as stack:
            clients = {arm: stack.enter_context(self.server(self.arm_flags(arm))) for arm in ARMS}
            for number in progress.track(range(self.args.rounds), description="conversation"):
                for arm in list(ARMS)[:: -1 if number % 2 else 1]:
                    rng = random.Random(f"{self.args.seed} {number}")
                    found[arm].append(conversation(clients[arm], rng))
        turns = {
            arm: [described(replies) for replies in zip(*rounds, strict=True)]
            for arm, rounds in found.items()
        }
        last = {arm: turns[arm][-1]["median_ttft_s"] for arm in ARMS}
        return {
            "server_flags": {arm: self.arm_flags(arm) for arm in ARMS},
            "tokens": {
                "turn": TURN_TOKENS,
                "answer": ANSWER_TOKENS,
                "between_turns": OTHER_TOKENS * OTHERS_PER_TURN,
                "device_pool": NUM_BLOCKS * BLOCK_SIZE,
            },
            "turns": turns,
            "last_turn_ttft_ratio": last["device only"] / last["host tier"],
        }


def described(replies: Sequence[Reply]) -> dict[str, Any]:
    """Return the same request of every round: its times, their median, what was cached."""
    times = [reply.ttft_s for reply in replies]
    return {
        "median_ttft_s": median(times),
        "median_cached_tokens": median(reply.cached_tokens for reply in replies),
        "ttft_s": times,
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line; ConfigError for a file that cannot be written."""
    parser = command_parser("prefix_cache", __doc__)
    parser.add_argument(
        "--model", default="llama-125m", help=f"what `serve` takes, or random: {', '.join(NAMED)}"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("shared", "conversation"), help="one of the two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=RESULT, help=f"JSON file ({RESULT})")
    parser.add_argument("server_flags", nargs="*", metavar="-- FLAG", help="of every server")
    args = parser.parse_args()
    args.output = output_path(args.output)
    return args


def measure(args: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Run what is asked for and return the result."""
    bench = Bench(args, folder)
    console.print("Filling the cache directory …")
    bench.prepare()
    result: dict[str, Any] = {
        **origin("prefix_cache"),
        "model": args.model,
        "seed": args.seed,
        "rounds": args.rounds,
    }
    with Progress(console=console, refresh_per_second=1) as progress:
        if args.only != "conversation":
            result["shared"] = bench.shared(progress)
        if args.only != "shared":
            result["conversation"] = bench.conversations(progress)
    return result


def show(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Print the medians."""
    if "shared" in result:
        shared = result["shared"]
        for name in ("first", "second"):
            print(f"{name} question behind a system prompt: {line_of(shared[name])}")
        print(f"TTFT, first / second: {shared['ttft_ratio']:.2f}")
    if "conversation" in result:
        found = result["conversation"]
        for arm, turns in found["turns"].items():
            print(f"turn {len(turns)}, {arm}: {line_of(turns[-1])}")
        print(f"TTFT, device only / host tier: {found['last_turn_ttft_ratio']:.2f}")


def line_of(described_replies: Mapping[str, Any]) -> str:
    """Return a median for people."""
    return (
        f"{1e3 * described_replies['median_ttft_s']:.1f} ms, "
        f"{described_replies['median_cached_tokens']:.0f} tokens cached"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(args, Path(folder), Console(stderr=True))


def main() -> int:
    """Measure, write, print; exit code 2 for a run that cannot be."""
    return run_command(parse_arguments, run, show)


if __name__ == "__main__":
    sys.exit(main())
