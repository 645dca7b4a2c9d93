"""What one seed has in store: machines, requests and faults, drawn before anything runs.

Rules: everything is drawn from the seed alone, in one order. Must not know: how any of it ends.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from math import inf
from typing import NamedTuple

from fastserve.core.cost_model import CostModel
from fastserve.core.request import Arrival, SamplingParams
from fastserve.executor.layout import Layout
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.config import SIMULATED_POLICIES, SIMULATED_PREEMPTION_MODES

WINDOW = 48
EOS, STOP_ID, POISON = 0, 1, 2
MEAN_NUM_REQUESTS = 104
NUM_REQUESTS = (MEAN_NUM_REQUESTS - 24, MEAN_NUM_REQUESTS + 24)
MEAN_NUM_FAULTS = 14
STEP_S = (0.002, 0.02)
MEAN_TOKENS = (1, 1, 1, 8)  # of answers, beyond the first
SEAT_S = (0.05, 0.15)  # for which a request has a seat, at full and at low load
MAX_SEATS = 5  # that are busy, whatever there are
PIPELINES = ((1, 0), (1, 1), (2, 0), (4, 0))
SWAPPING_MODES = ("proactive", "proactive-by-level", "reactive")
COSTS = CostModel(base_s=0.005, prefill_token_s=2e-4, decode_seq_s=2e-4, decode_context_s=1e-6)


class FaultKind(StrEnum):
    """What can go wrong; those that are planned stand first, and WEIGHTS has them all."""

    STEP_FAILED = "step failed"
    NO_NUMBERS = "no numbers for a request"
    ENGINE_KILLED = "engine killed"
    ENGINE_HUNG = "engine hung, then killed"
    RANK_LOST = "rank lost"
    ENGINE_STALLED = "engine stopped for a while"
    CLOCK_JUMPED = "clock jumped"
    CLOCK_STOOD_STILL = "clock stood still"
    COPY_FAILED = "copy failed"
    HOST_FULL = "host tier full"
    POISONED = "engine died of a request"
    WORDS_LOST = "words lost with an engine"
    GIVEN_UP = "replica given up"


WEIGHTS = {
    FaultKind.STEP_FAILED: 4.0,
    FaultKind.NO_NUMBERS: 1.0,
    FaultKind.ENGINE_KILLED: 1.5,
    FaultKind.ENGINE_HUNG: 0.7,
    FaultKind.RANK_LOST: 0.8,
    FaultKind.ENGINE_STALLED: 3.0,
    FaultKind.CLOCK_JUMPED: 2.0,
    FaultKind.CLOCK_STOOD_STILL: 2.0,
}


class Fault(NamedTuple):
    """What goes wrong in a replica; `lasts_s` is how long, where that means something."""

    at: float
    kind: FaultKind
    replica: int
    lasts_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request as its client wants it.

    The client leaves once it has `leaves_after` tokens, or after so many seconds; a stop string
    matches once it has `stops_after` tokens.
    """

    at: float
    arrival: Arrival
    leaves_after: float = inf
    leaves_after_s: float = inf
    stops_after: float = inf

    @property
    def is_poison(self) -> bool:
        """Whether it ends every engine that computes it."""
        return POISON in self.arrival.prompt_token_ids

    @property
    def is_refused(self) -> bool:
        """Whether it can never run."""
        params = self.arrival.params
        assert params.max_tokens is not None
        # One token may follow a prompt that fills the window.
        num_positions = len(self.arrival.prompt_token_ids) + params.max_tokens
        return num_positions - (params.max_tokens == 1) > WINDOW


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """All that a seed has drawn."""

    config: SchedulerConfig
    costs: CostModel
    num_device_blocks: int
    num_host_blocks: int
    layout: Layout
    num_replicas: int
    asked: tuple[tuple[Asked, ...], ...]  # the choices of each prompt
    faults: tuple[Fault, ...]
    share_failing_copies: float
    longest_copy_s: float
    longest_wire_s: float
    share_given_up: float  # of the engines that die, how many are not replaced
    check_every: int  # so many times that something happens in an engine


def draw_scenario(seed: int) -> Scenario:
    """Return what a seed has in store."""
    rng = random.Random(seed)
    config = _draw_config(rng)
    num_replicas = rng.choice((1, 1, 2, 3))
    asked = tuple(_draw_asked(rng, config, num_replicas))
    return Scenario(
        config=config,
        costs=replace(
            COSTS,
            copy_base_s=rng.choice((0.0, 1e-4)),
            copy_block_s=rng.choice((1e-6, 1e-4, 0.002)),
        ),
        num_device_blocks=-(-WINDOW // config.block_size) + rng.choice((0, 1, 5, 20, 40)),
        num_host_blocks=rng.choice((0, 1, 2, 10, 10, 60, 60)),
        layout=Layout(rng.choice((1, 1, 2)), config.num_slots),
        num_replicas=num_replicas,
        asked=asked,
        faults=tuple(_draw_faults(rng, num_replicas, asked[-1][0].at + 0.1)),
        share_failing_copies=rng.choice((0.0, 0.05, 0.2, 0.2, 1.0)),
        longest_copy_s=rng.choice((0.0, 0.01, 0.03, 0.3)),
        longest_wire_s=rng.choice((0.0, 0.001, 0.03)),
        share_given_up=rng.choice((0.0, 0.0, 0.0, 0.0, 0.1)),
        check_every=rng.choice((1, 16, 64, 256)),
    )


def _draw_config(rng: random.Random) -> SchedulerConfig:
    slots, lookahead = rng.choice(PIPELINES)
    max_num_seqs = rng.choice((1, 4, 6, 8, 8))
    is_chunked = rng.random() < 0.8
    num_tokens = rng.choice((max_num_seqs + 4, 12, 24)) if is_chunked else WINDOW
    return SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(num_tokens, max_num_seqs),
        max_model_len=WINDOW,
        block_size=rng.choice((1, 3, 4, 4, 8)),
        max_live_seqs=rng.choice((None, None, None, None, 1, 2, 3)),
        enable_chunked_prefill=is_chunked,
        enable_prefix_caching=rng.random() < 0.6,
        scheduling_policy=rng.choice(SIMULATED_POLICIES),
        starvation_limit=rng.choice((0.0, 0.01, 0.05, 1e9)),
        max_pause=rng.choice((0.005, 0.05, 0.6)),
        priority_aging=0.03,
        max_recompute_share=rng.choice((0.1, inf)),
        preemption_mode=rng.choice((*SIMULATED_PREEMPTION_MODES, *SWAPPING_MODES)),
        write_through=rng.choice((None, True, True, False)),
        num_slots=slots,
        lookahead=lookahead,
        eos_token_ids=frozenset((EOS,)),
        is_strict=True,
    )


def _draw_asked(
    rng: random.Random, config: SchedulerConfig, num_replicas: int
) -> Iterator[tuple[Asked, ...]]:
    """Yield prompts in order of arrival, each with one choice or several, at about full load."""
    shared = [[rng.randrange(10, 99) for _ in range(WINDOW)] for _ in range(3)]
    seats = min(config.max_num_seqs, config.max_live_seqs or MAX_SEATS, MAX_SEATS)
    mean_gap_s = rng.uniform(*SEAT_S) / (seats * num_replicas)
    share_of_bursts = rng.choice((0.0, 0.3, 0.8))
    has_poison = rng.random() < 0.15
    num_requests, at, number = rng.randint(*NUM_REQUESTS), 0.0, 0
    while number < num_requests:
        if rng.random() >= share_of_bursts:
            at += rng.expovariate(1.0 / mean_gap_s) / (1.0 - share_of_bursts)
        prompt = _draw_prompt(rng, shared)
        if has_poison and number and rng.random() < 0.01:
            prompt[-1] = POISON
        first = _draw_arrival(rng, prompt, number)
        num_choices = rng.choice((1, 1, 1, 1, 3))
        yield tuple(_draw_choice(rng, at, first, index) for index in range(num_choices))
        number += num_choices


def _draw_prompt(rng: random.Random, shared: list[list[int]]) -> list[int]:
    num_tokens = min(1 + int(rng.expovariate(1 / 6)), 36)
    if rng.random() < 0.005:
        num_tokens = WINDOW + 1
    num_shared = min(rng.choice((0, 4, 12, 24)), num_tokens - 1)
    own = [rng.randrange(100, 50_000) for _ in range(num_tokens - num_shared)]
    return rng.choice(shared)[:num_shared] + own


def _draw_arrival(rng: random.Random, prompt: list[int], seed: int) -> Arrival:
    room = max(WINDOW - len(prompt), 1)
    max_tokens = min(1 + int(rng.expovariate(1 / rng.choice(MEAN_TOKENS))), room)
    params = SamplingParams(
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=min(rng.choice((0, 0, 0, 3)), max_tokens),
        ignore_eos=rng.random() < 0.3,
        stop_token_ids=rng.choice(((), (), (STOP_ID,))),
        prompt_logprobs=rng.choice((None, None, None, None, 0)),
    )
    return Arrival(
        tuple(prompt),
        params,
        priority=rng.choice((0, 0, 0, -1, 1, 50)),
        client=rng.choice(("", "a", "b")),
        cache_salt=rng.choice(("", "", "", "s")),
    )


def _draw_choice(rng: random.Random, at: float, first: Arrival, index: int) -> Asked:
    max_tokens = first.params.max_tokens
    assert max_tokens is not None
    return Asked(
        at=at,
        arrival=replace(first, params=first.params.of_choice(index)),
        leaves_after=rng.randrange(max_tokens) if rng.random() < 0.04 else inf,
        leaves_after_s=rng.expovariate(10.0) if rng.random() < 0.04 else inf,
        stops_after=rng.randint(1, max_tokens) if rng.random() < 0.06 else inf,
    )


def _draw_faults(rng: random.Random, num_replicas: int, until: float) -> Iterator[Fault]:
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    for _ in range(rng.randint(MEAN_NUM_FAULTS - 6, MEAN_NUM_FAULTS + 6)):
        yield Fault(
            rng.uniform(0.0, until),
            rng.choices(kinds, weights)[0],
            rng.randrange(num_replicas),
            rng.choice((0.001, 0.03, 0.2, 2.0)),
        )
