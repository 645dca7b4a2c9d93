"""Made-up workloads: arrival processes, length distributions, mixes and sessions.

Rules: every draw comes from a numpy Generator that the caller seeds. Must not know: what the
workload is for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fastserve.sim.workload import Floats, Ints, Workload

Rng = np.random.Generator

EXAMPLE_RATE = 8.0
EXAMPLE_MEDIAN = 100.0


def arrivals(rng: Rng, num_requests: int, rate: float, cv: float = 1.0) -> Floats:
    """Return times of arrival whose gaps are Gamma with this mean rate and coefficient of
    variation: 1 is Poisson, 0 is a metronome.
    """
    if cv == 0.0:
        return np.arange(1, num_requests + 1) / rate
    shape = 1.0 / cv**2
    return np.cumsum(rng.gamma(shape, 1.0 / (rate * shape), num_requests))


class Lengths(Protocol):
    """A distribution of token counts."""

    def draw(self, rng: Rng, count: int) -> Ints:
        """Return so many lengths, each at least 1."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same."""

    tokens: int

    def draw(self, rng: Rng, count: int) -> Ints:
        """Return equal lengths."""
        return np.full(count, self.tokens, np.int64)


@dataclass(frozen=True, slots=True)
class Zipf:
    """P(x) ∝ x^-θ on low ≤ x ≤ high; θ = 0 is uniform."""

    theta: float
    low: int
    high: int

    def draw(self, rng: Rng, count: int) -> Ints:
        """Return lengths, most of them short."""
        values = np.arange(self.low, self.high + 1, dtype=np.int64)
        weights = values.astype(np.float64) ** -self.theta
        return rng.choice(values, count, p=weights / weights.sum())


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Logarithms are normal around log(median) with standard deviation sigma; cut to the range."""

    median: float
    sigma: float
    low: int
    high: int

    def draw(self, rng: Rng, count: int) -> Ints:
        """Return lengths with a heavy tail."""
        drawn = rng.lognormal(np.log(self.median), self.sigma, count)
        return np.clip(np.rint(drawn), self.low, self.high).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Empirical:
    """Drawn with replacement from observed lengths."""

    observed: Ints

    def draw(self, rng: Rng, count: int) -> Ints:
        """Return a resample."""
        return rng.choice(self.observed, count)


def generate(
    rng: Rng, num_requests: int, rate: float, prompt: Lengths, output: Lengths, *, cv: float = 1.0
) -> Workload:
    """Return requests with independent prompt and answer lengths."""
    return Workload(
        arrived_at=arrivals(rng, num_requests, rate, cv),
        prompt_tokens=prompt.draw(rng, num_requests),
        output_tokens=output.draw(rng, num_requests),
    )


def example(rng: Rng, num_requests: int) -> Workload:
    """Return requests for a first look: chats of mixed lengths, as many as the default machine
    (opt-13b on one a100-40g) can just answer, so that its memory is full and policies differ.
    """
    lengths = Lognormal(EXAMPLE_MEDIAN, 1.0, 1, 1024)
    return generate(rng, num_requests, EXAMPLE_RATE, lengths, lengths)


def resample(rng: Rng, observed: Workload, num_requests: int, rate: float, cv: float) -> Workload:
    """Return rows drawn with replacement, prompt and answer together, at new times."""
    rows = observed.rows(rng.integers(len(observed), size=num_requests))
    return rows.arriving(arrivals(rng, num_requests, rate, cv))


def mix(rng: Rng, parts: Mapping[str, tuple[float, Workload]], num_requests: int) -> Workload:
    """Return lengths from several workloads in shares; `source` names the part of each row.

    A part's rows are drawn with replacement, prompt and answer together; arrivals come one a
    second, Poisson.
    """
    names = list(parts)
    shares = np.array([parts[name][0] for name in names])
    chosen = rng.choice(len(names), num_requests, p=shares / shares.sum())
    prompt = np.empty(num_requests, np.int64)
    output = np.empty(num_requests, np.int64)
    for index, name in enumerate(names):
        rows = np.flatnonzero(chosen == index)
        _, part = parts[name]
        drawn = rng.integers(len(part), size=len(rows))
        prompt[rows], output[rows] = part.prompt_tokens[drawn], part.output_tokens[drawn]
    return Workload(
        arrived_at=arrivals(rng, num_requests, 1.0),
        prompt_tokens=prompt,
        output_tokens=output,
        source=tuple([names[index] for index in chosen.tolist()]),
    )


def beside(parts: Mapping[str, Workload]) -> Workload:
    """Return the rows of several tenants, by arrival; `tenant` names whose each row is.

    Of the other columns only lengths are kept.
    """
    arrived_at = np.concatenate([part.arrived_at for part in parts.values()])
    order = np.argsort(arrived_at, kind="stable")
    owners = np.repeat(list(parts), [len(part) for part in parts.values()])
    return Workload(
        arrived_at=arrived_at[order],
        prompt_tokens=np.concatenate([part.prompt_tokens for part in parts.values()])[order],
        output_tokens=np.concatenate([part.output_tokens for part in parts.values()])[order],
        tenant=tuple(owners[order].tolist()),
    )


def sessions(
    rng: Rng,
    num_sessions: int,
    rate: float,
    turns: Lengths,
    prompt: Lengths,
    output: Lengths,
    mean_think_s: float,
) -> Workload:
    """Return conversations for a closed loop: turn k + 1 carries all of turn k and a new prompt.

    Sessions begin at `rate`; pauses are exponential. A row's `arrived_at` is its session's start.
    """
    starts = arrivals(rng, num_sessions, rate)
    num_turns = turns.draw(rng, num_sessions)
    session_id = np.repeat(np.arange(num_sessions), num_turns)
    total = len(session_id)
    new_prompt, outputs = prompt.draw(rng, total), output.draw(rng, total)
    is_first = np.concatenate([[True], session_id[1:] != session_id[:-1]])
    grown = np.cumsum(new_prompt + outputs) - outputs  # all prompts so far and answers before
    before = np.concatenate([[0], np.cumsum(new_prompt + outputs)[:-1]])
    origin = before[is_first][session_id]
    return Workload(
        arrived_at=starts[session_id],
        prompt_tokens=grown - origin,
        output_tokens=outputs,
        session_id=session_id,
        think_s=np.where(is_first, 0.0, rng.exponential(mean_think_s, total)),
    )


def jittered(rng: Rng, workload: Workload, seconds: float) -> Workload:
    """Return the same with uniform noise of up to `seconds` on each arrival, for coarse clocks."""
    moved = workload.arrived_at + rng.uniform(0.0, seconds, len(workload))
    order = np.argsort(moved, kind="stable")
    return dataclasses.replace(workload.rows(order), arrived_at=moved[order])
