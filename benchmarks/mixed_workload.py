"""What is asked of a live server: many short answers beside a few long ones, or a trace's lengths.

Rules: one seed gives the same requests in the same rhythm at every rate; arrivals are Poisson.
Prompts are ids of exact length, drawn anew for each request, so that no cache knows them.
Must not know: time, HTTP.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastserve.sim.trace_file import read_trace

SHORT_TOKENS, LONG_TOKENS = (8, 32), (800, 1200)
PROMPT_TOKENS = (50, 100)
NUM_IDS = 1000  # prompts are made of the ids below; every model has as many


class Lengths(NamedTuple):
    """Tokens of a prompt and of the part of its answer that is read, and who asks."""

    prompt: int
    output: int
    client: str = ""


class Ask(NamedTuple):
    """One request."""

    prompt_token_ids: list[int]
    num_output_tokens: int
    client: str = ""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests and, for each, the seconds after the start at which it is due."""

    requests: list[Ask]
    due_s: list[float]


def draw_mix(seed: int, count: int, long_share: float) -> list[Lengths]:
    """Return lengths of which exactly `long_share` are long, in random order."""
    rng = random.Random(seed)
    num_long = round(count * long_share)
    outputs = [rng.randint(*LONG_TOKENS) for _ in range(num_long)]
    outputs += [rng.randint(*SHORT_TOKENS) for _ in range(count - num_long)]
    rng.shuffle(outputs)
    return [Lengths(rng.randint(*PROMPT_TOKENS), output) for output in outputs]


def trace_lengths(path: Path, count: int, window: int) -> list[Lengths]:
    """Return the first rows of a trace, cut to the window, and their clients where it has them.

    Raises WorkloadError when the file cannot be used.
    """
    trace = read_trace(path, count).fitted(window, "clip")
    clients = trace.client or ("",) * len(trace)
    rows = zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), clients, strict=True)
    return [Lengths(*row) for row in rows]


def with_prompts(rng: random.Random, lengths: Iterable[Lengths]) -> Iterator[Ask]:
    """Yield a request for each, with ids of its own."""
    for each in lengths:
        yield Ask(rng.choices(range(NUM_IDS), k=each.prompt), each.output, each.client)


def draw_workload(seed: int, lengths: Sequence[Lengths], rate: float) -> Workload:
    """Return requests of these lengths, the first at once, with `rate` arrivals a second."""
    rng = random.Random(seed)
    requests = list(with_prompts(rng, lengths))
    due, now = [], 0.0
    for _ in requests:
        due.append(now)
        now += rng.expovariate(rate)
    return Workload(requests, due)


def is_short(num_output_tokens: int) -> bool:
    """Whether a request of the mix is one of the many."""
    return num_output_tokens <= SHORT_TOKENS[1]
