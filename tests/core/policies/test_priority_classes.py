"""Priority classes: strict order, aging that no class waits for ever, and the way home."""

from __future__ import annotations

from random import Random

import pytest

from fastserve.core.cost_model import CostModel
from fastserve.core.policies.fcfs import FCFS
from fastserve.core.policies.mlfq import MLFQ
from fastserve.core.policies.priority_classes import PriorityClasses
from fastserve.core.policies.protocol import Policy
from fastserve.core.request import FinishReason, Request
from tests.core import builders
from tests.core.builders import order, run

AGING = 10.0
ONE_STEP = 0.0  # a quantum that any step uses up


def make_request(handle: int, priority: int) -> Request:
    """Return a request that has done nothing yet."""
    return builders.make_request(handle, 2, priority=priority)


def make_slow_mlfq() -> MLFQ:
    """Return an inner policy with levels in which no request starves."""
    return make_mlfq(starvation_limit=1e9)


def make_mlfq(starvation_limit: float = 5.0) -> MLFQ:
    """Return an inner policy with levels."""
    return MLFQ(
        CostModel(base_s=1.0, prefill_token_s=0.25),
        quantum_s=1.0,
        quantum_ratio=2.0,
        starvation_limit=starvation_limit,
        max_num_seqs=1,
        max_chunk=8,
        skip_join=True,
    )


def admit(policy: PriorityClasses, priorities: list[int], now: float = 0.0) -> list[Request]:
    """Admit one request per priority, handles in order."""
    requests = [make_request(handle, priority) for handle, priority in enumerate(priorities)]
    builders.admit(policy, requests, now)
    return requests


def land(policy: Policy, request: Request, now: float) -> None:
    """Let a step of a second of one request land."""
    run(policy, [request], 1.0, now)


def test_lower_values_go_first_and_extremes_are_clamped() -> None:
    """Strict between classes, first come first served within; beyond ±100 is ±100."""
    policy = PriorityClasses(FCFS, AGING, ONE_STEP)
    admit(policy, [0, 5, -3, 0, 100, 10_000, -100, -10_000, 5])
    assert order(policy) == [6, 7, 2, 0, 3, 1, 8, 4, 5]


def test_waiting_lifts_by_one_class_at_a_time() -> None:
    """A request moves up a class every `aging_s`, and keeps its place by arrival there."""
    policy = PriorityClasses(FCFS, AGING, ONE_STEP)
    requests = admit(policy, [2, 1, 0])
    now = 0.0
    while now < AGING - 1:
        now += 1.0
        land(policy, requests[1], now)
        land(policy, requests[2], now)
        assert order(policy, now) == [2, 1, 0]
    land(policy, requests[1], AGING)
    land(policy, requests[2], AGING)
    assert order(policy, AGING) == [2, 0, 1]  # in class 1, where it is the oldest
    land(policy, requests[1], 2 * AGING - 1)
    land(policy, requests[2], 2 * AGING - 1)
    assert order(policy, 2 * AGING - 1) == [2, 0, 1]
    land(policy, requests[2], 2 * AGING)
    assert order(policy, 2 * AGING) == [0, 2, 1]  # in class 0


def test_a_lifted_request_goes_home_when_it_has_run() -> None:
    """After one step it is back in its class, and waits a full `aging_s` for the next lift."""
    policy = PriorityClasses(FCFS, AGING, ONE_STEP)
    low, high = admit(policy, [1, 0])
    for turn in range(1, 6):
        land(policy, high, turn * AGING)
        assert order(policy, turn * AGING) == [0, 1], f"turn {turn}"
        land(policy, low, turn * AGING)
        assert order(policy, turn * AGING) == [1, 0]
        land(policy, high, turn * AGING + AGING - 0.5)
        assert order(policy, turn * AGING + AGING - 0.5) == [1, 0]


def test_a_lifted_request_runs_for_a_whole_quantum() -> None:
    """Three seconds of steps, however they are spread; then it is back, to wait for a full lift."""
    policy = PriorityClasses(FCFS, AGING, 3.0)
    low, high = admit(policy, [1, 0])
    now = AGING
    land(policy, high, now)
    for turn in range(3):
        assert order(policy, now) == [0, 1], f"lifted, and {turn} of 3 s used"
        land(policy, high, now)  # a step without it takes nothing of its quantum
        now += AGING / 2
        land(policy, low, now)
    assert order(policy, now) == [1, 0]
    land(policy, high, now + AGING - 0.5)
    assert order(policy, now + AGING - 0.5) == [1, 0]
    assert order(policy, now + AGING) == [0, 1]


def test_one_that_runs_is_lifted_no_further() -> None:
    """It has got to the middle class, and runs there within every `aging_s`."""
    policy = PriorityClasses(FCFS, AGING, 100.0)
    low, middle, high = admit(policy, [2, 1, 0])
    now = AGING
    for _ in range(10):
        land(policy, middle, now)
        land(policy, high, now)
        assert order(policy, now) == [2, 0, 1]
        land(policy, low, now)
        now += AGING - 1.0


def test_every_lift_is_by_one_class_however_often_it_was_lifted() -> None:
    """The third lift of a request is no faster than its first."""
    policy = PriorityClasses(FCFS, AGING, ONE_STEP)
    requests = admit(policy, [3, 2, 1, 0])
    low, others = requests[0], requests[1:]
    now = 0.0
    for _ in range(4):
        for _ in range(10):
            now += AGING / 10
            for request in others:
                land(policy, request, now)
        assert order(policy, now) == [3, 2, 0, 1]
        land(policy, low, now)
        assert order(policy, now) == [3, 2, 1, 0]


@pytest.mark.parametrize("num_classes", [2, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_the_lowest_class_heads_the_order_in_time(num_classes: int, seed: int) -> None:
    """Bounded waiting: of c classes, under constant load above, within c · aging_s.

    The bound holds for any stream of arrivals, because the lifted keep their place by arrival.
    """
    rng = Random(seed)
    policy = PriorityClasses(FCFS, AGING, ONE_STEP)
    waiting = admit(policy, list(range(num_classes)))
    lowest, waiting = waiting[-1], waiting[:-1]
    now, handle, waited_since = 0.0, num_classes, 0.0
    longest, num_heads = 0.0, 0
    while num_heads < 5:
        now += 0.5
        waiting.append(make_request(handle, rng.randrange(num_classes - 1)))
        builders.admit(policy, [waiting[-1]], now)
        handle += 1
        policy.advance(now)
        head = next(policy.ordered())
        if head is lowest:
            num_heads += 1
            longest = max(longest, now - waited_since)
            waited_since = now
            land(policy, lowest, now)
        elif rng.random() < 0.5:
            policy.finished(head, FinishReason.STOP)
            waiting.remove(head)
        else:
            land(policy, head, now)
        assert now - waited_since <= num_classes * AGING
    assert longest >= (num_classes - 1) * AGING  # and strictly by class until then


def test_the_coldest_is_in_the_lowest_class() -> None:
    """Estimates do not contradict the order: no class loses KV before a lower one."""
    policy = PriorityClasses(FCFS, 0.5, ONE_STEP)
    requests = admit(policy, [0] * 40 + [1] * 3 + [2] * 3)
    estimates = [policy.coldness(r, 0.0) for r in policy.ordered()]
    assert estimates == sorted(set(estimates))
    for request in requests[40:]:
        policy.finished(request, FinishReason.STOP)
    assert order(policy) == list(range(40))


def test_seconds_are_told_where_no_class_is_above() -> None:
    """An estimate behind requests of a higher class would be a guess; behind none it is not."""
    policy = PriorityClasses(make_mlfq, AGING, ONE_STEP)
    low, high = admit(policy, [1, 0])
    assert policy.estimated_next_schedule_time(low, 0.0) is None
    assert policy.estimated_next_schedule_time(high, 0.0) == 0.0
    policy.finished(high, FinishReason.STOP)
    assert policy.estimated_next_schedule_time(low, 0.0) == 0.0


def test_a_lift_keeps_the_level_and_what_is_used_of_its_quantum() -> None:
    """Two of the four seconds of level 2 used, lifted, run once, sent back: one is left."""
    policy = PriorityClasses(make_slow_mlfq, AGING, ONE_STEP)
    low, _ = admit(policy, [1, 0])
    for now in (1.0, 2.0, 3.0, 4.0):
        land(policy, low, now)
    assert policy.level(low) == 2
    assert order(policy, 3.0 + AGING) == [1, 0]
    assert order(policy, 4.0 + AGING) == [1, 0]
    assert policy.coldness(low, 4.0 + AGING)[0] == 0, "lifted"
    assert policy.level(low) == 2
    land(policy, low, 15.0)
    assert policy.coldness(low, 15.0)[0] == 1, "back in its class"
    assert policy.level(low) == 2
    land(policy, low, 16.0)
    assert policy.level(low) == 3


def test_one_class_is_the_inner_policy() -> None:
    """Where all have one priority, there is nothing between the scheduler and the policy."""
    policy, bare = PriorityClasses(make_mlfq, AGING, ONE_STEP), make_mlfq()
    requests = admit(policy, [7, 7, 7])
    builders.admit(bare, requests)
    for now in (1.0, 2.0, 3.0, 99.0):
        bare.advance(now)
        policy.advance(now)
        request = next(bare.ordered())
        assert next(policy.ordered()) is request
        land(policy, request, now)
        bare.ran([request], now)
        for other in requests:
            assert policy.level(other) == bare.level(other)
            assert policy.coldness(other, now) == bare.coldness(other, now)
            estimate = policy.estimated_next_schedule_time(other, now)
            assert estimate == bare.estimated_next_schedule_time(other, now)
    assert policy.stats() == bare.stats()


def test_those_who_came_before_the_second_class_age_too() -> None:
    """Aging begins with the second class, for all requests."""
    policy = PriorityClasses(FCFS, AGING, ONE_STEP)
    low = make_request(0, 5)
    builders.admit(policy, [low], 0.0)
    order(policy, 50.0)
    high = make_request(1, 0)
    builders.admit(policy, [high], 50.0)
    assert order(policy, 50.0) == [1, 0]
    assert order(policy, 50.0 + AGING - 0.001) == [1, 0]
    assert order(policy, 50.0 + AGING) == [0, 1]


def test_nothing_is_left_of_those_who_ended() -> None:
    """Neither lifts nor ends leave entries behind."""
    policy = PriorityClasses(make_mlfq, 1e9, ONE_STEP)
    for handle in range(5_000):
        request = make_request(handle, handle % 3)
        builders.admit(policy, [request], float(handle))
        land(policy, request, float(handle))
        policy.finished(request, FinishReason.STOP)
    assert len(policy._deadlines._heap) <= 66
    assert not len(policy._deadlines)
    assert not policy._members
    assert not policy._class_of
    assert not policy._lifts


def test_without_requests_time_changes_nothing() -> None:
    """Before the first request there is no class, and nothing to wake for."""
    assert PriorityClasses(FCFS, AGING, ONE_STEP).next_event(1.0) == float("inf")
