"""The figures of an offline engine and of a live server that take turns.

Rules: plain arithmetic. `total` counts output tokens over all the time; `decode` those that came
after the last request's first one, over the time from then to the end. `gap` is the median time
between two pieces of an answer, offline between two steps. Ratios are server / offline, formed in
each round, and then the median. Processor time is a share of one core: a server shows what it can
do only where API process and client together find a core that the engine leaves.
Must not know: processes, files, how the figures came about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from rich.table import Table

from fastserve.bench.stream_client import Answer
from fastserve.settings.option import ConfigError

SPEEDS = ("total_tokens_per_s", "decode_tokens_per_s", "gap_ms")
SHARES = {"api": "API process", "engine": "engine", "client": "client"}

Figures = dict[str, float]


class Round(NamedTuple):
    """Both once, one right after the other."""

    offline: Figures
    server: Figures


def pieces_per_token(answers: Sequence[Answer]) -> float:
    """Return how many events stood for one token: below 1 where characters span tokens."""
    pieces = sum(len(answer.piece_times) for answer in answers)
    return pieces / sum(answer.output_tokens for answer in answers)


def decode_speed(answers: Sequence[Answer]) -> float:
    """Return the tokens a second since the last answer's first piece.

    Pieces are what can be timed; whole answers tell how many tokens one stands for.
    """
    began = max(answer.piece_times[0] for answer in answers)
    ended = max(answer.piece_times[-1] for answer in answers)
    if ended <= began:
        raise ConfigError("--output-len: too few tokens to time decoding")
    pieces = sum(moment > began for answer in answers for moment in answer.piece_times)
    return pieces / pieces_per_token(answers) / (ended - began)


def run_rounds(
    rounds: int, offline: Callable[[], Figures], server: Callable[[int], Figures]
) -> Iterator[Round]:
    """Yield every round, the first of them to warm up; every other one begins with the server."""
    for number in range(1 + rounds):
        if number % 2:
            before = offline()
            yield Round(before, server(number))
        else:
            first = server(number)
            yield Round(offline(), first)


def ratios(one: Round) -> Figures:
    """Return server / offline of the speeds."""
    return {name: one.server[name] / one.offline[name] for name in SPEEDS}


def summary(rounds: Sequence[Round]) -> dict[str, Figures]:
    """Return the medians over the rounds, each figure by itself."""

    def medians(of: Callable[[Round], Mapping[str, float]]) -> Figures:
        return {name: median(of(each)[name] for each in rounds) for name in of(rounds[0])}

    return {
        "ratios": medians(ratios),
        "offline": medians(lambda each: each.offline),
        "server": medians(lambda each: each.server),
    }


def as_table(result: Mapping[str, Any]) -> Table:
    """Lay the medians over the rounds out for people."""
    middle, each = result["median"], [one["ratios"] for one in result["rounds"]]
    shares = [f"{title} {middle['server'][name]:.0%}" for name, title in SHARES.items()]
    table = Table(
        title=f"{result['streams']} streams, {result['input_len']} + {result['output_len']} tokens,"
        f" threads: {result['threads']}, rounds: {len(each)}",
        caption=f"of a core: {', '.join(shares)}; offline {middle['offline']['engine']:.0%}",
    )
    for heading in ("", "offline", "server", "server / offline", "least - most"):
        table.add_column(heading, justify="right")
    for name, title in zip(
        SPEEDS, ("total, tokens/s", "decode, tokens/s", "step, gap between pieces, ms"), strict=True
    ):
        values = [one[name] for one in each]
        table.add_row(
            title,
            f"{middle['offline'][name]:,.2f}",
            f"{middle['server'][name]:,.2f}",
            f"{middle['ratios'][name]:.3f}",
            f"{min(values):.3f} - {max(values):.3f}",
        )
    return table
