"""The mix: many short answers, a few long ones, one seeded Poisson stream.

Rules: lengths are exact, because the client asks for them with `ignore_eos`. Must not know: time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

SHORT_TOKENS, LONG_TOKENS = (8, 32), (800, 1200)
PROMPT_WORDS = (24, 48)
# fmt: off
WORDS = (
    "the", "a", "one", "two", "little", "big", "red", "blue", "old", "new", "happy", "quiet",
    "girl", "boy", "dog", "cat", "bird", "tree", "house", "river", "garden", "flower", "stone",
    "ran", "saw", "found", "gave", "made", "went", "looked", "smiled", "jumped", "slept", "played",
    "asked", "said", "and", "then", "but",
)
# fmt: on


class Ask(NamedTuple):
    """One request."""

    prompt: str
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests and, for each, the seconds after the start at which it is due."""

    requests: list[Ask]
    due_s: list[float]


def draw_requests(rng: random.Random, count: int, long_share: float) -> list[Ask]:
    """Return requests of which exactly `long_share` are long, in random order."""
    num_long = round(count * long_share)
    lengths = [rng.randint(*LONG_TOKENS) for _ in range(num_long)]
    lengths += [rng.randint(*SHORT_TOKENS) for _ in range(count - num_long)]
    rng.shuffle(lengths)
    return [
        Ask(" ".join(rng.choices(WORDS, k=rng.randint(*PROMPT_WORDS))), length)
        for length in lengths
    ]


def draw_workload(seed: int, count: int, long_share: float, rate: float) -> Workload:
    """Return seeded requests with Poisson arrivals of `rate` a second."""
    rng = random.Random(seed)
    requests = draw_requests(rng, count, long_share)
    due, now = [], 0.0
    for _ in requests:
        due.append(now)
        now += rng.expovariate(rate)
    return Workload(requests, due)


def is_short(num_output_tokens: int) -> bool:
    """Whether a request is one of the many."""
    return num_output_tokens <= SHORT_TOKENS[1]
