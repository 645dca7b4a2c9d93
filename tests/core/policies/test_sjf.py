"""Shortest job first, by hand and against a naive replay of its rules."""

from __future__ import annotations

from random import Random

import pytest

from fastserve.core.build import policy_factory
from fastserve.core.cost_model import CostModel
from fastserve.core.policies.priority_classes import PriorityClasses
from fastserve.core.policies.run_to_completion import RunToCompletion
from fastserve.core.policies.sjf import PRIOR_TOKENS, MeanAnswer, ShortestJobFirst
from fastserve.core.request import FinishReason, Request
from tests.core.builders import admit, note_step, order
from tests.core.builders import make_request as bare_request
from tests.core.harness import small_config

# A prefill token takes 1 s, a decode 1 s and 0.01 s for each token that it attends to.
COST = CostModel(base_s=0.0, prefill_token_s=1.0, decode_seq_s=1.0, decode_context_s=0.01)


def make_policy(mean: MeanAnswer | None = None) -> RunToCompletion:
    """Return the policy, which learns from nothing if not told otherwise."""
    return RunToCompletion(ShortestJobFirst(COST, 1000, mean or MeanAnswer()))


def make_request(
    handle: int, num_prompt: int = 1, num_cached: int = 0, num_output: int = 0
) -> Request:
    """Return a request with so many tokens of an answer."""
    request = bare_request(handle, num_prompt)
    request.num_cached_tokens = num_cached
    for _ in range(num_output):
        request.append(5)
    return request


def test_the_mean_is_of_the_answers_that_ended() -> None:
    """Whatever ended them, unless a step failed or nothing was answered; at first it is a guess."""
    mean = MeanAnswer()
    assert mean.num_tokens == PRIOR_TOKENS
    for reason, num_output, expected in (
        (FinishReason.ERROR, 900, PRIOR_TOKENS),
        (FinishReason.ABORT, 0, PRIOR_TOKENS),
        (FinishReason.ABORT, 10, 10.0),
        (FinishReason.LENGTH, 30, 20.0),
        (FinishReason.STOP, 500, 20.0),  # the third
        (FinishReason.STOP, 60, 150.0),
        *[(FinishReason.STOP, 50, 150.0)] * 3,
        (FinishReason.STOP, 50, 100.0),  # the eighth
    ):
        mean.add(make_request(0, num_output=num_output), reason)
        assert mean.num_tokens == expected


def test_the_shortest_prefill_begins_first_then_the_oldest() -> None:
    """Running, waiting and time change nothing of those that have not begun."""
    policy = make_policy()
    admit(policy, [make_request(h, n) for h, n in enumerate((30, 10, 20, 10))])
    assert order(policy, 0.0) == [1, 3, 2, 0]
    assert order(policy, 1e9) == [1, 3, 2, 0]


def test_the_mean_decides_what_a_cached_prompt_is() -> None:
    """Cached, 1,000 tokens spare a prefill but slow each decode: longer answers, longer job."""
    mean = MeanAnswer()
    policy = make_policy(mean)
    bare, cached = make_request(0, 60), make_request(1, 1000, num_cached=990)
    admit(policy, [bare, cached])
    # 60 + n · (1 + 0.01 · (60 + …)) against 10 + n · (1 + 0.01 · (1000 + …)): equal at n = 5.3.
    assert order(policy) == [0, 1]
    short = make_request(2, 500, num_output=4)
    admit(policy, [short])
    note_step(policy, [short], 1.0, 1.0)
    policy.finished(short, FinishReason.STOP)
    assert order(policy) == [1, 0]
    assert policy.coldness(cached, 0.0)[1] == pytest.approx(10 + 4 * (1 + 0.01 * 1003))


def test_what_one_class_learns_all_know() -> None:
    """An end in a priority class moves the jobs of another."""
    factory = policy_factory(small_config(scheduling_policy="sjf", max_model_len=2000), COST, 1000)
    policy = PriorityClasses(factory, 1e9, 0.0)
    bare, cached = make_request(0, 60), make_request(1, 1000, num_cached=990)
    first = bare_request(2, 5, priority=-1)
    admit(policy, [bare, cached, first])
    assert order(policy) == [2, 0, 1]
    for _ in range(4):
        first.append(5)
    policy.finished(first, FinishReason.STOP)
    assert order(policy) == [1, 0]


class NaiveSJF:
    """The rules word by word."""

    def __init__(self) -> None:
        self.waiting: list[Request] = []
        self.begun: list[Request] = []
        self.answers: list[int] = []
        self.mean = PRIOR_TOKENS

    def end(self, request: Request, reason: FinishReason) -> None:
        if reason is not FinishReason.ERROR and request.num_output_tokens:
            self.answers.append(request.num_output_tokens)
            if len(self.answers) in (1, 2, 4, 8, 16, 32, 64, 128):
                self.mean = sum(self.answers) / len(self.answers)

    def job_s(self, request: Request) -> float:
        prefill_s = float(max(request.num_tokens - request.num_cached_tokens, 1))
        middle = request.num_tokens + round(self.mean / 2)
        return prefill_s + self.mean * (1.0 + 0.01 * (middle + 1))

    def ordered(self) -> list[int]:
        self.waiting.sort(key=lambda r: (round(self.job_s(r), 6), r.handle))
        return [request.handle for request in self.begun + self.waiting]


@pytest.mark.parametrize("seed", range(30))
def test_against_the_naive_replay(seed: int) -> None:
    """Random arrivals, steps and ends: the same order throughout."""
    rng = Random(seed)
    policy, naive, now = make_policy(), NaiveSJF(), 0.0
    for handle in range(150):
        event = rng.random()
        live = naive.begun + naive.waiting
        if event < 0.5 or not live:
            num_prompt = rng.randrange(2, 300)
            cached = rng.choice((0, num_prompt // 2, num_prompt - 1))
            naive.waiting.append(make_request(handle, num_prompt, cached))
            admit(policy, [naive.waiting[-1]], now)
        elif event < 0.75:
            naive.ordered()
            ran = (naive.begun + naive.waiting)[: rng.choice((1, 3))]
            for request in ran:
                request.num_computed_tokens = request.num_tokens
                for _ in range(rng.choice((1, 10))):
                    request.append(5)
            now += 0.5
            note_step(policy, ran, 0.5, now)
            new = [request for request in ran if request in naive.waiting]
            naive.begun += new
            naive.waiting = [r for r in naive.waiting if r not in new]
        else:
            request, reason = rng.choice(live), rng.choice(tuple(FinishReason))
            policy.finished(request, reason)
            (naive.begun if request in naive.begun else naive.waiting).remove(request)
            naive.end(request, reason)
        assert order(policy, now) == naive.ordered()
