"""What every policy promises: a pure order, time in one place, accounts that move with requests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

import pytest

from fastserve.core.build import policy_factory
from fastserve.core.cost_model import CostModel
from fastserve.core.policies.fcfs import FCFS
from fastserve.core.policies.priority_classes import PriorityClasses
from fastserve.core.policies.protocol import ClassPolicy, Policy
from fastserve.core.request import FinishReason, Request
from fastserve.sim.config import SIMULATED_POLICIES
from tests.core.builders import admit, make_request, note_step
from tests.core.harness import small_config

COST = CostModel(base_s=0.5, prefill_token_s=0.25, decode_seq_s=0.25)
LENGTHS = {handle: 1 + handle * 7 % 30 for handle in range(500)}
AGING = 4.0
FAIR = "fair "  # among tenants
NAMES = (*SIMULATED_POLICIES, f"{FAIR}learned")
MAX_ADVANCES = 100  # until what was learned is in the order


def factory(name: str) -> Callable[[], ClassPolicy]:
    """Return what makes policies of a name, which learn together."""
    config = small_config(
        scheduling_policy=name.removeprefix(FAIR),
        fairness=name.startswith(FAIR),
        starvation_limit=3.0,
    )
    return policy_factory(config, COST, 1000, LENGTHS)


def make_inner(name: str) -> ClassPolicy:
    """Return a policy by name, in which requests starve after three seconds."""
    return factory(name)()


def in_classes(name: str) -> Policy:
    """Return priority classes of a policy."""
    return PriorityClasses(factory(name), AGING, 0.0)


POLICIES: dict[str, Callable[[], Policy]] = {
    **{name: partial(make_inner, name) for name in NAMES},
    **{f"classes of {name}": partial(in_classes, name) for name in NAMES},
}

PREDICTING = [name for name, make in POLICIES.items() if make().predictions is not None]


def handles(policy: Policy) -> list[int]:
    """Return the order as it stands."""
    return [request.handle for request in policy.ordered()]


def settle(policy: Policy, now: float) -> None:
    """Let time do its part, which what was learned may need several plans for."""
    policy.advance(now)
    for _ in range(MAX_ADVANCES):
        if policy.next_event(now) > now:
            break
        policy.advance(now)


class Traffic:
    """Random arrivals, steps and ends over one policy, in virtual time."""

    def __init__(self, policy: Policy, seed: int) -> None:
        self.policy = policy
        self.rng = Random(seed)
        self.now = 0.0
        self.live: list[Request] = []
        self.num_added = 0
        self.tenants: tuple[str, ...] = ("a", "b", "c")

    def turn(self) -> None:
        """Let something happen to some requests."""
        rng, event = self.rng, self.rng.random()
        if event < 0.4 or not self.live:
            request = make_request(
                self.num_added,
                rng.choice((1, 5, 20)),
                priority=rng.randrange(3),
                tenant=self.tenants[self.num_added % len(self.tenants)],
            )
            self.num_added += 1
            self.live.append(request)
            admit(self.policy, [request], self.now)
        elif event < 0.8:
            self.policy.advance(self.now)
            ran = list(self.policy.ordered())[: rng.choice((1, 2, 4))]
            for request in ran:
                request.num_computed_tokens = request.num_tokens
                request.append(1)
            self.now += 0.5
            note_step(self.policy, ran, 0.5, self.now)
        else:
            request = self.live.pop(rng.randrange(len(self.live)))
            self.policy.finished(request, rng.choice(tuple(FinishReason)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", POLICIES)
def test_looking_changes_nothing(name: str, seed: int) -> None:
    """Of two policies with the same traffic, the one that is looked at plans as the other does."""
    seen, unseen = Traffic(POLICIES[name](), seed), Traffic(POLICIES[name](), seed)
    for _ in range(120):
        seen.turn()
        unseen.turn()
        for request in seen.live:
            seen.policy.coldness(request, seen.now)
            seen.policy.estimated_next_schedule_time(request, seen.now)
            if seen.policy.levels is not None:
                seen.policy.levels.level(request)
            if seen.policy.predictions is not None:
                seen.policy.predictions.predicted_output_tokens(request)
        if seen.policy.predictions is not None:
            list(seen.policy.predictions.expected_work())
        next(seen.policy.ordered(), None)
        assert handles(seen.policy) == handles(seen.policy)
        seen.policy.next_event(seen.now)
        for traffic in (seen, unseen):
            traffic.policy.advance(traffic.now)
        assert handles(seen.policy) == handles(unseen.policy)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", POLICIES)
def test_nothing_changes_before_the_next_event(name: str, seed: int) -> None:
    """Time alone leaves the order as it is until `next_event`, once `advance` has done its part."""
    traffic = Traffic(POLICIES[name](), seed)
    policy = traffic.policy
    for _ in range(120):
        traffic.turn()
        settle(policy, traffic.now)
        before = handles(policy)
        event = policy.next_event(traffic.now)
        assert event > traffic.now
        policy.advance(min(event, traffic.now + 100.0) - 1e-6)
        assert handles(policy) == before


@pytest.mark.parametrize("name", POLICIES)
def test_the_head_is_among_the_warmest(name: str) -> None:
    """No request that runs first loses its KV before one of the last."""
    traffic = Traffic(POLICIES[name](), 1)
    for _ in range(200):
        traffic.turn()
        traffic.policy.advance(traffic.now)
        coldness = [traffic.policy.coldness(r, traffic.now) for r in traffic.policy.ordered()]
        assert not coldness or coldness[0] == min(coldness)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", PREDICTING)
def test_the_work_in_the_system_is_that_of_its_requests(name: str, seed: int) -> None:
    """Through steps, ends, moves between classes and what is learned; a prediction stays."""
    traffic = Traffic(POLICIES[name](), seed)
    policy, predicted = traffic.policy, dict[int, float]()
    for _ in range(200):
        traffic.turn()
        policy.advance(traffic.now)
        predictions = policy.predictions
        assert predictions is not None
        expected = list(predictions.expected_work())
        assert sum(count for _, count in expected) == len(traffic.live)
        assert all(work_s > 0.0 for work_s, _ in expected)
        work_s = sum(work_s * count for work_s, count in expected)
        assert predictions.forecasts().work_s == pytest.approx(work_s)
        for request in traffic.live:
            tokens = predictions.predicted_output_tokens(request)
            assert predicted.setdefault(request.handle, tokens) == tokens > 0.0
        num_answers = sum(predictions.forecasts().num_by_decile)
    assert num_answers > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_request_that_moves_there_and_back_is_where_it_was(name: str) -> None:
    """To change the class is not to end: level, quantum and deadline are kept."""
    make = factory(name)
    policy, other = make(), make()
    traffic = Traffic(policy, 7)
    for _ in range(60):
        traffic.turn()
        settle(policy, traffic.now)
        coldness = {r.handle: policy.coldness(r, traffic.now) for r in traffic.live}
        event = policy.next_event(traffic.now)
        for request in list(policy.ordered()):
            policy.move(request, other)
        assert handles(policy) == []
        settle(other, traffic.now)
        for request in list(other.ordered()):
            other.move(request, policy)
        settle(policy, traffic.now)
        assert {r.handle: policy.coldness(r, traffic.now) for r in traffic.live} == coldness
        assert policy.next_event(traffic.now) == event


class Tally:
    """How requests ended, over all priority classes."""

    def __init__(self) -> None:
        self.reasons: list[FinishReason] = []


class Learner(FCFS):
    """A policy that learns from ends."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def finished(self, request: Request, reason: FinishReason) -> None:
        """Note the reason."""
        super().finished(request, reason)
        self._tally.reasons.append(reason)


def test_what_one_class_learns_all_know_and_a_move_is_no_end() -> None:
    """A part handed to every class hears of each end once, and why; of lifts it hears nothing."""
    tally = Tally()
    policy = PriorityClasses(lambda: Learner(tally), AGING, 0.0)
    high, low = make_request(0, priority=0), make_request(1, priority=1)
    admit(policy, [high, low])
    policy.advance(AGING)
    assert handles(policy) == [0, 1]
    assert policy.coldness(low, AGING)[0] == 0, "lifted"
    note_step(policy, [low], 1.0, AGING + 1.0)
    assert policy.coldness(low, AGING)[0] == 1, "back in its class"
    assert not tally.reasons
    policy.finished(low, FinishReason.ABORT)
    policy.finished(high, FinishReason.LENGTH)
    assert tally.reasons == [FinishReason.ABORT, FinishReason.LENGTH]
