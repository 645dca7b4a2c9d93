"""Run to completion: what has begun stays ahead, whatever the others are ordered by."""

from __future__ import annotations

from random import Random

import pytest

from fastserve.core.build import build_policy
from fastserve.core.policies.protocol import ClassPolicy
from fastserve.core.request import FinishReason, Request
from tests.core.builders import admit, make_request, one_second, order, prompt_of, run
from tests.core.harness import UNIT_COST, Harness, small_config

POLICIES = ("hrrn", "sjf")


def make_policy(name: str) -> ClassPolicy:
    """Return a policy that runs to completion."""
    return build_policy(small_config(scheduling_policy=name), UNIT_COST)


def plan(*requests: Request, now: float) -> None:
    """Note that a plan has these, as the scheduler does."""
    for request in requests:
        request.first_scheduled_at = now


@pytest.mark.parametrize("name", POLICIES)
def test_those_that_have_begun_stay_ahead_in_the_order_they_began(name: str) -> None:
    """Neither a shorter prompt, nor a loss of KV, nor a wait behind others changes it."""
    policy = make_policy(name)
    long, middle, short, last = (make_request(h, n) for h, n in enumerate((60, 30, 8, 2)))
    admit(policy, [long])
    run(policy, [long], 1.0, 1.0)
    admit(policy, [middle, short], 1.0)
    assert order(policy, 1.0) == [0, 2, 1]
    run(policy, [long, short], 1.0, 2.0)
    admit(policy, [last], 2.0)
    long.restart()
    assert order(policy, 2.0) == [0, 2, 3, 1]
    run(policy, [short], 1.0, 3.0)
    assert order(policy, 3.0) == [0, 2, 3, 1]
    policy.finished(long, FinishReason.STOP)
    assert order(policy, 1e6)[0] == 2


@pytest.mark.parametrize("name", POLICIES)
def test_a_request_has_begun_while_its_first_step_is_in_flight(name: str) -> None:
    """A shorter one that came since is not planned before it, nor takes its KV."""
    policy = make_policy(name)
    taken, other, shorter = (make_request(h, n) for h, n in enumerate((30, 60, 2)))
    admit(policy, [taken, other])
    assert order(policy) == [0, 1]
    plan(taken, now=0.0)
    admit(policy, [shorter], 0.1)
    assert policy.coldness(taken, 0.1) < policy.coldness(shorter, 0.1)
    assert order(policy, 0.1) == [0, 2, 1]
    run(policy, [taken], 1.0, 1.0)
    assert order(policy, 1.0) == [0, 2, 1]


@pytest.mark.parametrize("name", POLICIES)
def test_those_that_begin_together_keep_their_order(name: str) -> None:
    """The first of a plan has its tokens; the older one behind it would take them in the next."""
    policy = make_policy(name)
    long, short = make_request(0, 60), make_request(1, 30)
    admit(policy, [long, short])
    assert order(policy) == [1, 0]
    plan(short, long, now=0.0)
    assert order(policy, 0.5) == [1, 0]
    assert policy.coldness(long, 0.5) > policy.coldness(short, 0.5)
    run(policy, [short, long], 1.0, 1.0)
    assert order(policy, 1.0) == [1, 0]


@pytest.mark.parametrize("name", POLICIES)
def test_one_that_began_behind_another_is_found_when_its_step_lands(name: str) -> None:
    """Where the head of a queue could not run, the plan had the one behind it."""
    policy = make_policy(name)
    passed_over, taken = make_request(0, 30), make_request(1, 30)
    admit(policy, [passed_over, taken])
    assert order(policy) == [0, 1]
    plan(taken, now=0.0)
    run(policy, [taken], 1.0, 1.0)
    assert order(policy, 1.0) == [1, 0]


@pytest.mark.parametrize("name", POLICIES)
def test_the_last_to_begin_loses_its_kv_first(name: str) -> None:
    """The order of coldness is that of beginning, then that of the others."""
    policy = make_policy(name)
    requests = [make_request(handle, 40 - 9 * handle) for handle in range(4)]
    for now, request in enumerate(requests[:3]):
        admit(policy, [request], float(now))
        run(policy, [request], 1.0, now + 1.0)
    admit(policy, requests[3:], 3.0)
    assert order(policy, 3.0) == [0, 1, 2, 3]
    coldness = [policy.coldness(request, 3.0) for request in requests]
    assert coldness == sorted(set(coldness))


@pytest.mark.parametrize("name", POLICIES)
def test_a_request_moves_with_what_it_is(name: str) -> None:
    """Between classes one that has begun stays one, and one in flight becomes one."""
    here, there = make_policy(name), make_policy(name)
    begun, in_flight, waiting = (make_request(h, 60 - 20 * h) for h in range(3))
    admit(here, [begun, in_flight, waiting])
    run(here, [begun], 1.0, 1.0)
    plan(in_flight, now=1.0)
    for request in (waiting, in_flight, begun):
        here.move(request, there)
    assert order(here, 1.0) == []
    assert order(there, 1.0) == [0, 1, 2]


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("name", POLICIES)
def test_with_memory_for_all_nobody_is_preempted(name: str, lookahead: int) -> None:
    """Whatever arrives while steps are in flight, a seat is left by an end alone."""
    config = small_config(
        scheduling_policy=name, max_num_seqs=3, max_num_batched_tokens=40, lookahead=lookahead
    )
    for seed in range(20):
        rng = Random(seed)
        harness = Harness(config, 1000, seed=seed)
        for handle in range(30):
            harness.add(prompt_of(handle, rng.randrange(1, 40)), rng.randrange(1, 20))
            for _ in range(rng.choice((0, 0, 1, 3))):
                if harness.live:
                    harness.step()
        harness.drain()
        assert harness.scheduler.stats().num_preemptions == 0


def test_memory_that_the_next_lacks_holds_up_those_behind_it() -> None:
    """As under fcfs: a small one that would fit does not slip in before it."""
    config = small_config(scheduling_policy="hrrn", max_num_batched_tokens=64, block_size=1)
    harness = Harness(config, 64, step_s=one_second)
    harness.add(prompt_of(0, 40), 20)
    harness.step()
    harness.add(prompt_of(1, 30), 2)  # 24 places are free
    for _ in range(10):
        harness.step()
    harness.add(prompt_of(2, 4), 2)
    harness.drain()
    first_plan: dict[int, int] = {}
    for index, plan in enumerate(harness.executor.plans):
        for work in plan.work:
            first_plan.setdefault(work.handle, index)
    assert first_plan == {0: 0, 1: 20, 2: 20}
