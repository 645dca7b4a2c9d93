"""Highest response ratio next, by hand and against a naive replay of its rules."""

from __future__ import annotations

import math
from itertools import islice
from random import Random

import pytest

from fastserve.core.cost_model import CostModel
from fastserve.core.policies.hrrn import HighestRatioNext
from fastserve.core.policies.protocol import Coldness
from fastserve.core.policies.run_to_completion import RunToCompletion
from fastserve.core.request import FinishReason, Request
from tests.core.builders import admit, note_step, order
from tests.core.builders import make_request as bare_request

# A decode takes 1 s, the shortest prefill too, one of n tokens n s.
COST = CostModel(base_s=0.0, prefill_token_s=1.0, decode_seq_s=1.0)


def make_policy() -> RunToCompletion:
    """Return the policy over a fresh order."""
    return RunToCompletion(HighestRatioNext(COST, 1000))


def make_request(handle: int, num_prompt: int, arrived_at: float, num_cached: int = 0) -> Request:
    """Return a request that came when it says."""
    request = bare_request(handle, num_prompt)
    request.arrived_at = arrived_at
    request.num_cached_tokens = num_cached
    return request


def test_waiting_makes_up_for_length() -> None:
    """Ratios less 1 at 8 s: (8 - 0) / 8 and (8 - 4) / 4 are equal; before it the long one leads."""
    policy = make_policy()
    admit(policy, [make_request(0, 8, 0.0), make_request(1, 4, 4.0)])
    assert order(policy, 7.9) == [0, 1]
    assert order(policy, 8.9) == [1, 0]
    admit(policy, [make_request(2, 2, 9.0)])
    assert order(policy, 11.0) == [1, 0, 2]  # 7/4, 11/8, 2/2
    assert order(policy, 13.0) == [1, 2, 0]  # 9/4, 4/2, 13/8
    assert order(policy, 14.0) == [2, 1, 0]  # 5/2, 10/4: equal, and the shorter goes first


def test_a_stream_of_short_ones_starves_nobody() -> None:
    """One of 64 s goes ahead of those of 1 s that came 64 times later than it."""
    policy = make_policy()
    admit(policy, [make_request(0, 64, 0.0)])
    for handle in range(1, 200):
        admit(policy, [make_request(handle, 1, 10.0 * handle)])
        policy.advance(10.0 * handle + 5.0)
        if next(policy.ordered()).handle == 0:
            break
        note_step(policy, [next(policy.ordered())], 1.0, 10.0 * handle + 5.0)
        policy.finished(next(policy.ordered()), FinishReason.STOP)
    assert handle == 32  # (320 + 5) / 64 > 5 / 1


def test_service_is_the_prefill_that_no_cache_spares() -> None:
    """A long prompt that is cached is a short job; chunks cost what they cost."""
    policy = make_policy()
    admit(policy, [make_request(0, 16, 0.0), make_request(1, 64, 0.0, num_cached=60)])
    assert order(policy, 1.0) == [1, 0]
    cost = CostModel(base_s=8.0, prefill_token_s=1.0)
    chunked = RunToCompletion(HighestRatioNext(cost, 4))
    admit(chunked, [make_request(0, 12, 0.0), make_request(1, 16, 0.0, num_cached=8)])
    assert order(chunked, 100.0) == [1, 0]  # 16 and 8 tokens: 36 s and 24 s


def test_time_acts_once_in_a_minimum_iteration() -> None:
    """Between two of them the order stands; the next event says when it may change."""
    policy = make_policy()
    admit(policy, [make_request(0, 8, 0.0)])
    assert order(policy, 7.5) == [0]
    assert policy.next_event(7.5) == math.inf, "one queue never changes"
    admit(policy, [make_request(1, 4, 4.0)])
    assert order(policy, 8.4) == [0, 1], "ratios are of 7.5 s"
    assert policy.next_event(8.4) == 8.5
    assert order(policy, 8.5) == [1, 0]
    assert policy.next_event(8.5) == 9.5


def test_those_that_came_since_the_ratios_were_taken_have_waited_for_nothing() -> None:
    """Their ratio is 1: behind all that wait, and the shorter before the longer."""
    policy = make_policy()
    admit(policy, [make_request(0, 8, 0.0)])
    policy.advance(5.0)
    admit(policy, [make_request(1, 64, 5.1), make_request(2, 2, 5.6)])
    assert order(policy, 5.7) == [0, 2, 1]


class NaiveHRRN:
    """The rules word by word."""

    def __init__(self) -> None:
        self.waiting: list[Request] = []
        self.begun: list[Request] = []
        self.ranked_at = -math.inf

    def service_s(self, request: Request) -> float:
        return float(max(request.num_tokens - request.num_cached_tokens, 1))

    def ratio(self, request: Request, service_s: float) -> float:
        return (max(self.ranked_at - request.arrived_at, 0.0) + service_s) / service_s

    def ordered(self, now: float) -> list[int]:
        if now >= self.ranked_at + 1.0:
            self.ranked_at = now
        services = {r.handle: self.rounded(self.service_s(r)) for r in self.waiting}
        self.waiting.sort(
            key=lambda r: (
                -self.ratio(r, services[r.handle]), services[r.handle], r.arrived_at, r.handle
            )
        )  # fmt: skip
        return [request.handle for request in self.begun + self.waiting]

    def rounded(self, service_s: float) -> float:
        return min((2.0 ** (i / 8) for i in range(80)), key=lambda s: abs(math.log(s / service_s)))


@pytest.mark.parametrize("seed", range(30))
def test_against_the_naive_replay(seed: int) -> None:
    """Random arrivals, also late ones, steps and ends: the same order throughout.

    It is that of the exact ratios, but for those of two that are less than a tenth apart.
    """
    rng = Random(seed)
    policy, naive = make_policy(), NaiveHRRN()
    now, num_added = 0.0, 0
    for _ in range(150):
        now += rng.choice((0.0, 0.25, 3.0))
        live = naive.begun + naive.waiting
        event = rng.random()
        if event < 0.5 or not live:
            num_prompt = rng.randrange(1, 300)
            cached = rng.choice((0, 0, num_prompt // 2))
            age_s = rng.choice((0.0, 0.0, 7.5))
            naive.waiting.append(make_request(num_added, num_prompt, now - age_s, cached))
            num_added += 1
            policy.admit(naive.waiting[-1], now)
        elif event < 0.75:
            expected = naive.ordered(now)[: rng.choice((1, 3))]
            policy.advance(now)
            ran = list(islice(policy.ordered(), len(expected)))
            assert [request.handle for request in ran] == expected
            now += 0.5
            note_step(policy, ran, 0.5, now)
            new = [request for request in ran if request in naive.waiting]
            naive.begun += new
            naive.waiting = [r for r in naive.waiting if r not in new]
        else:
            request = rng.choice(live)
            policy.finished(request, FinishReason.STOP)
            (naive.begun if request in naive.begun else naive.waiting).remove(request)
        assert order(policy, now) == naive.ordered(now)
        exact = [naive.ratio(r, naive.service_s(r)) - 1.0 for r in naive.waiting]
        least = math.inf
        for ratio in exact:
            assert ratio <= least * 1.1 + 1e-9
            least = min(least, ratio)


class Counting(HighestRatioNext):
    """It counts the ratios that it is asked for."""

    num_keys = 0

    def key(self, request: Request) -> Coldness:
        """Count."""
        self.num_keys += 1
        return super().key(request)


def test_a_plan_looks_at_few_of_ten_thousand() -> None:
    """To read the head of the order costs the heads of the queues, not all that wait."""
    waiting = Counting(COST, 1000)
    policy = RunToCompletion(waiting)
    rng = Random(0)
    admit(policy, [make_request(h, rng.randrange(1, 4000), h / 100) for h in range(10_000)])
    policy.advance(1000.0)
    assert waiting.num_keys == 0
    head = [request.handle for request in islice(policy.ordered(), 300)]
    assert waiting.num_keys < 500
    assert head == order(policy, 1000.0)[:300]
