"""The multi-level feedback queue, by hand and against a naive replay of the paper's rules."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import pytest

from fastserve.core.cost_model import CostModel
from fastserve.core.policies.mlfq import MLFQ
from fastserve.core.request import FinishReason, Request
from tests.core.builders import admit, note_step, order, run
from tests.core.builders import make_request as bare_request

# A decode takes 1 s, a prefill of n tokens (3 + n) / 4. Quanta: 1, 2, 4, 8, 16, …
COST = CostModel(base_s=0.75, prefill_token_s=0.25, decode_seq_s=0.25)


def make_policy(**changes: Any) -> MLFQ:
    """Return an MLFQ with quanta 1, 2, 4, … unless told otherwise."""
    settings: dict[str, Any] = {
        "quantum_s": 1.0,
        "quantum_ratio": 2.0,
        "starvation_limit": 100.0,
        "max_num_seqs": 2,
        "max_chunk": 1000,
        "skip_join": True,
    }
    return MLFQ(COST, **(settings | changes))


def make_request(handle: int, num_prompt: int = 1, num_cached: int = 0) -> Request:
    """Return a request that has done nothing yet."""
    request = bare_request(handle, num_prompt)
    request.num_cached_tokens = num_cached
    return request


@pytest.mark.parametrize(
    ("num_prompt", "num_cached", "level"),
    [
        (1, 0, 0),  # 1 s: exactly the quantum of level 0
        (2, 0, 1),  # 1.25 s
        (5, 0, 1),  # 2 s
        (6, 0, 2),  # 2.25 s
        (13, 0, 2),  # 4 s
        (14, 0, 3),  # 4.25 s
        (61, 0, 4),  # 16 s
        (62, 0, 5),  # 16.25 s
        (62, 57, 1),  # five tokens are left
        (62, 61, 0),  # one is left
    ],
)
def test_join_level_covers_the_uncached_prefill(
    num_prompt: int, num_cached: int, level: int
) -> None:
    """Skip-join: min{i : qᵢ ≥ seconds of the whole prefill that no cache spares}."""
    request = make_request(0, num_prompt, num_cached)
    policy = make_policy()
    admit(policy, [request])
    assert policy.level(request) == level
    naive = make_policy(skip_join=False)
    admit(naive, [request])
    assert naive.level(request) == 0


def test_join_level_counts_every_chunk() -> None:
    """A prefill of 12 in chunks of 4 is three steps, 5.25 s; in one it would take 3.75 s."""
    policy = make_policy(max_chunk=4)
    request = make_request(0, 12)
    admit(policy, [request])
    assert policy.level(request) == 3


def test_demotion_exactly_when_the_next_iteration_does_not_fit() -> None:
    """Level 2 holds 4 s: used 3 + next 1 fits, used 3.001 + next 1 does not."""
    for used, level in ((3.0, 2), (3.001, 3)):
        policy = make_policy()
        request = make_request(0, 13)
        admit(policy, [request])
        run(policy, [request], used, used)
        assert policy.level(request) == level
    assert policy.stats().num_demotions == 1


def test_the_quantum_is_billed_over_steps_and_starts_anew_below() -> None:
    """Level 1 holds one more decode after the first; level 2 starts from nothing."""
    policy = make_policy()
    request = make_request(0, 2)
    admit(policy, [request])
    run(policy, [request], 1.0, 1.0)
    assert policy.level(request) == 1
    run(policy, [request], 1.0, 2.0)
    assert policy.level(request) == 2
    for now, level in ((3.0, 2), (4.0, 2), (5.0, 2), (6.0, 3)):
        run(policy, [request], 1.0, now)
        assert policy.level(request) == level


def test_everyone_in_a_step_is_billed_all_of_it() -> None:
    """A decode beside another request's long prefill pays for the step, as in the paper."""
    policy = make_policy()
    decode, prefill = make_request(0, 2), make_request(1, 60)
    admit(policy, [decode, prefill])
    run(policy, [decode, prefill], 15.0, 15.0)
    assert (policy.level(decode), policy.level(prefill)) == (2, 4)


def test_demotion_skips_levels_that_cannot_hold_the_next_chunk() -> None:
    """Without skip-join a prefill falls from level 0 to the level that holds its next chunk."""
    policy = make_policy(skip_join=False, max_chunk=20)
    request = make_request(0, 40)
    admit(policy, [request])
    request.num_computed_tokens = 20
    note_step(policy, [request], 6.0, 6.0)
    assert policy.level(request) == 3  # the next chunk takes 5.75 s
    request.num_computed_tokens = 37
    note_step(policy, [request], 5.5, 11.5)
    assert policy.level(request) == 3  # 5.5 + 1.5 fits into 8
    request.num_computed_tokens = 40
    request.append(5)
    note_step(policy, [request], 2.0, 13.5)
    assert policy.level(request) == 4  # 7.5 + 1 does not


def test_first_in_first_out_within_a_level_and_demotion_to_its_tail() -> None:
    """A level is a queue: arrivals and the demoted go to the tail, running moves none."""
    policy = make_policy()
    first, second, third = make_request(0, 2), make_request(1, 6), make_request(2, 6)
    admit(policy, [first, second, third])
    assert order(policy) == [0, 1, 2]
    run(policy, [first], 2.0, 2.0)  # to level 2, behind those there
    assert order(policy) == [1, 2, 0]
    late = make_request(3, 6)
    admit(policy, [late], 2.0)
    run(policy, [second], 1.0, 3.0)  # 1 + 1 still fits into 4
    assert order(policy) == [1, 2, 0, 3]
    policy.finished(third, FinishReason.STOP)
    assert order(policy) == [1, 0, 3]


def test_promotion_at_exactly_the_limit_since_it_last_ran() -> None:
    """Not a moment before α; running puts it off; level 0 starts with a fresh quantum."""
    policy = make_policy(starvation_limit=10.0)
    long, other = make_request(0, 60), make_request(1, 60)
    admit(policy, [long], 0.0)
    admit(policy, [other], 3.0)
    order(policy, 9.999)
    assert policy.level(long) == 4
    run(policy, [long], 1.0, 9.999)
    order(policy, 10.0)
    order(policy, 12.999)
    assert (policy.level(long), policy.level(other)) == (4, 4)
    order(policy, 13.0)
    assert (policy.level(long), policy.level(other)) == (4, 0)
    order(policy, 9.999 + 10.0)
    assert policy.level(long) == 0
    assert policy.stats().num_promotions == 2
    assert order(policy, 20.0) == [1, 0]
    run(policy, [long], 1.0, 21.0)
    assert policy.level(long) == 1


def test_the_promoted_start_with_a_whole_quantum() -> None:
    """What was used in the level below is forgotten."""
    policy = make_policy(starvation_limit=10.0, quantum_s=4.0)
    request = make_request(0, 29)
    admit(policy, [request])
    run(policy, [request], 7.0, 7.0)
    assert policy.level(request) == 1
    order(policy, 17.0)
    for now, level in ((18.0, 0), (19.0, 0), (20.0, 0), (21.0, 1)):
        run(policy, [request], 1.0, now)
        assert policy.level(request) == level


def test_who_waits_longest_is_promoted_first() -> None:
    """Several that starve at once line up by when they last ran, behind those in level 0."""
    policy = make_policy(starvation_limit=10.0)
    requests = [make_request(handle, 60) for handle in range(4)]
    for request, now in zip(requests, (0.0, 1.0, 2.0, 3.0), strict=True):
        admit(policy, [request], now)
    run(policy, [requests[0]], 0.5, 2.5)
    short = make_request(9)
    admit(policy, [short], 30.0)
    assert order(policy, 30.0) == [9, 1, 2, 0, 3]


def test_a_request_in_flight_does_not_starve() -> None:
    """A request that computes at this moment is not promoted, however long the step takes."""
    policy = make_policy(starvation_limit=1.0)
    request = make_request(0, 60)
    admit(policy, [request])
    request.steps_in_flight = 1
    order(policy, 15.0)
    assert policy.level(request) == 4
    request.steps_in_flight = 0
    run(policy, [request], 16.0, 16.0)
    assert policy.level(request) == 5
    order(policy, 16.999)
    assert policy.level(request) == 5
    order(policy, 17.0)
    assert policy.level(request) == 0


def test_no_starvation_limit_means_no_promotion_and_no_memory() -> None:
    """With α beyond the end of time nothing is promoted and nothing piles up."""
    policy = make_policy(starvation_limit=1e12)
    for handle in range(20_000):
        request = make_request(handle, 2)
        admit(policy, [request], float(handle))
        run(policy, [request], 1.0, float(handle))
        run(policy, [request], 1.0, float(handle))
        policy.finished(request, FinishReason.STOP)
    assert order(policy, 1e9) == []
    assert len(policy._deadlines._heap) <= 66
    assert policy.stats().num_promotions == 0


def test_enst_by_hand() -> None:
    """(1/B) Σ over those above of the quanta they burn until they are as low: B = 2."""
    policy = make_policy()
    levels = (0, 0, 1, 3, 3, 4)
    requests = [make_request(h, 4 * 2**level - 3) for h, level in enumerate(levels)]
    admit(policy, requests)
    assert tuple(policy.level(request) for request in requests) == levels
    estimates = [policy.estimated_next_schedule_time(request, 7.0) for request in requests]
    # Level 1: 2 · 1. Level 3: 2 · (1 + 2 + 4) + 1 · (2 + 4). Level 4: 2 · 15 + 1 · 14 + 2 · 8.
    assert estimates == [0.0, 0.0, 1.0, 10.0, 10.0, 30.0]
    policy.finished(requests[3], FinishReason.STOP)
    assert policy.estimated_next_schedule_time(requests[5], 7.0) == 26.0
    assert policy.estimated_next_schedule_time(requests[5], 80.0) == 20.0  # until promotion
    assert policy.estimated_next_schedule_time(requests[5], 200.0) == 0.0


@dataclass
class _Job:
    request: Request
    level: int
    used_s: float
    last_ran_at: float


class NaiveMLFQ:
    """The rules word by word, over one list in queue order."""

    def __init__(self, alpha: float, max_chunk: int, skip_join: bool) -> None:
        self.alpha, self.max_chunk, self.skip_join = alpha, max_chunk, skip_join
        self.jobs: list[_Job] = []

    def holding(self, seconds: float) -> int:
        return next(i for i in range(99) if 2.0**i >= seconds)

    def admit(self, request: Request, now: float) -> None:
        left = request.num_prompt_tokens - request.num_cached_tokens
        seconds = 0.0
        while left:
            chunk = min(left, self.max_chunk)
            seconds += 0.75 + 0.25 * chunk
            left -= chunk
        self.jobs.append(_Job(request, self.holding(seconds) if self.skip_join else 0, 0.0, now))

    def charge(self, shares: list[tuple[Request, int]], device_s: float, now: float) -> None:
        for request, _ in shares:
            job = self.job(request)
            job.used_s += device_s
            job.last_ran_at = now
            left = min(request.num_tokens - request.num_computed_tokens, self.max_chunk)
            next_s = 0.75 + 0.25 * left
            if job.used_s + next_s > 2.0**job.level:
                job.level = max(job.level + 1, self.holding(next_s))
                job.used_s = 0.0
                self.to_tail(job)

    def job(self, request: Request) -> _Job:
        return next(job for job in self.jobs if job.request is request)

    def to_tail(self, job: _Job) -> None:
        self.jobs = [other for other in self.jobs if other is not job] + [job]

    def ordered(self, now: float) -> list[int]:
        starving = [job for job in self.jobs if job.level and job.last_ran_at + self.alpha <= now]
        for job in sorted(starving, key=lambda job: (job.last_ran_at, job.request.handle)):
            job.level, job.used_s = 0, 0.0
            self.to_tail(job)
        return [job.request.handle for job in sorted(self.jobs, key=lambda job: job.level)]

    def enst(self, request: Request, now: float) -> float:
        mine = self.job(request)
        above = [job.level for job in self.jobs if job.level < mine.level]
        burnt = sum(2.0**i for level in above for i in range(level, mine.level)) / 2
        return burnt if not mine.level else max(min(mine.last_ran_at + self.alpha - now, burnt), 0)


@pytest.mark.parametrize("seed", range(60))
def test_against_the_naive_replay(seed: int) -> None:
    """Random arrivals, chunks, steps and ends: the same levels, order and estimates throughout."""
    rng = Random(seed)
    alpha, max_chunk = rng.choice((0.0, 3.0, 20.0, 1e9)), rng.choice((3, 10, 99))
    skip_join = rng.random() < 0.7
    policy = make_policy(starvation_limit=alpha, max_chunk=max_chunk, skip_join=skip_join)
    naive = NaiveMLFQ(alpha, max_chunk, skip_join)
    now, live, num_added = 0.0, list[Request](), 0
    for _ in range(150):
        now += rng.choice((0.0, 0.5, 4.0))
        event = rng.random()
        if event < 0.3 or not live:
            num_prompt = rng.choice((1, 2, 9, 30))
            live.append(make_request(num_added, num_prompt, rng.choice((0, num_prompt // 2))))
            num_added += 1
            admit(policy, [live[-1]], now)
            naive.admit(live[-1], now)
        elif event < 0.85:
            shares = []
            for request in rng.sample(live, min(len(live), rng.choice((1, 2, 4)))):
                num_tokens = min(request.num_tokens - request.num_computed_tokens, max_chunk)
                request.num_computed_tokens += num_tokens
                if request.num_computed_tokens == request.num_tokens:
                    request.append(5)
                shares.append((request, num_tokens))
            device_s = rng.choice((0.25, 1.0, 3.5))
            note_step(policy, [request for request, _ in shares], device_s, now)
            naive.charge(shares, device_s, now)
        else:
            request = live.pop(rng.randrange(len(live)))
            policy.finished(request, FinishReason.STOP)
            naive.jobs.remove(naive.job(request))
        assert order(policy, now) == naive.ordered(now)
        for request in live:
            assert policy.level(request) == naive.job(request).level
            estimate = policy.estimated_next_schedule_time(request, now)
            assert estimate == pytest.approx(naive.enst(request, now))
