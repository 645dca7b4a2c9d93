"""Fair shares of tenants: who has had less goes first, nothing is saved up, one alone is alone."""

from __future__ import annotations

from itertools import islice
from random import Random

import numpy as np
import pytest

from fastserve.core.build import build_policy
from fastserve.core.cost_model import CostModel
from fastserve.core.policies.fair_tenants import BURST_S, FairTenants, ServiceCounters
from fastserve.core.policies.fcfs import FCFS
from fastserve.core.policies.priority_classes import PriorityClasses
from fastserve.core.request import FinishReason, Request
from fastserve.sim.generators import Fixed, Lognormal, arrivals, beside, generate
from fastserve.sim.sim_executor import EOS_TOKEN_ID
from fastserve.sim.simulator import Machine, Outcome, simulate
from fastserve.sim.workload import Workload
from tests.core import builders
from tests.core.builders import admit, order, run
from tests.core.harness import Harness, small_config
from tests.core.policies.test_contract import Traffic

NUM_SEATS = 4
COSTS = CostModel(base_s=0.4, prefill_token_s=0.125)  # a seat's token is 0.1 s


def make_policy() -> tuple[FairTenants, ServiceCounters]:
    """Return tenants whose requests are first come, first served, and their counters."""
    counters = ServiceCounters(COSTS, NUM_SEATS)
    return FairTenants(FCFS, counters, NUM_SEATS), counters


def make_requests(tenants: str) -> list[Request]:
    """Return a request for each letter, which is its tenant."""
    return [builders.make_request(handle, 2, tenant=name) for handle, name in enumerate(tenants)]


def owners(policy: FairTenants, count: int = NUM_SEATS) -> str:
    """Return whose the first requests of the order are."""
    return "".join(request.tenant for request in islice(policy.ordered(), count))


def test_equal_counters_share_the_seats_equally() -> None:
    """One by one, tenants by name where they are equal; within each by the inner policy."""
    policy, _ = make_policy()
    admit(policy, make_requests("aaaaaabbbc"))
    assert order(policy) == [0, 6, 9, 1, 7, 2, 8, 3, 4, 5]


def test_who_is_behind_gets_seats_until_it_is_not() -> None:
    """A quarter of BURST_S is a seat of four; all of it is all of them."""
    policy, counters = make_policy()
    requests = make_requests("aaaaaabbbbbb")
    admit(policy, requests)
    run(policy, requests[:1], 0.5, 0.5)  # a prompt of two tokens: a quarter of a second
    assert counters.given_s("a") == 0.25
    assert owners(policy) == "baba"
    for _ in range(3):
        run(policy, requests[:1], 0.5, 1.0)
    assert counters.given_s("a") == pytest.approx(0.55)
    assert owners(policy) == "bbba"
    for _ in range(9):
        run(policy, requests[:1], 0.5, 1.0)
    assert owners(policy) == "bbbb"


def test_what_was_not_used_is_not_saved_up() -> None:
    """However long a tenant was away, it is BURST_S behind and no more."""
    policy, counters = make_policy()
    requests = make_requests("ab")
    admit(policy, requests[:1])
    for _ in range(100):
        run(policy, requests[:1], 0.5, 1.0)
    admit(policy, requests[1:])
    most = counters.given_s("a")
    assert most > 9 * BURST_S
    assert counters.given_s("b") == most - BURST_S
    run(policy, requests[1:], 0.5, 1.0)
    assert counters.given_s("b") == pytest.approx(most - BURST_S + 0.25)


def test_only_what_is_new_counts() -> None:
    """Neither what a cache spared nor what is computed once more; the last tokens do."""
    policy, counters = make_policy()
    (request,) = make_requests("a")
    request.num_cached_tokens = 1
    admit(policy, [request])
    run(policy, [request], 0.5, 0.5)
    assert counters.given_s("a") == pytest.approx(0.1), "a token of two"
    request.num_computed_tokens = 0
    policy.ran([request], 1.0)
    assert counters.given_s("a") == pytest.approx(0.1)
    request.num_computed_tokens = 3
    policy.finished(request, FinishReason.LENGTH)
    assert counters.given_s("a") == pytest.approx(0.2)


def test_one_tenant_alone_is_the_inner_policy() -> None:
    """Order, coldness, events and forecasts of `learned`, through random traffic."""
    bare, fair = (
        build_policy(small_config(scheduling_policy="learned", fairness=fairness), COSTS)
        for fairness in (False, True)
    )
    assert isinstance(fair, FairTenants)
    traffics = [Traffic(bare, 3), Traffic(fair, 3)]
    for traffic in traffics:
        traffic.tenants = ("only",)
    for _ in range(300):
        for traffic in traffics:
            traffic.turn()
        now = traffics[0].now
        assert [r.handle for r in fair.ordered()] == [r.handle for r in bare.ordered()]
        for mine, other in zip(traffics[0].live, traffics[1].live, strict=True):
            assert bare.coldness(mine, now) == fair.coldness(other, now)
        assert bare.next_event(now) == fair.next_event(now) or not traffics[0].live


def test_nothing_is_left_of_those_who_ended() -> None:
    """But a counter for each tenant."""
    policy, counters = make_policy()
    rng = Random(1)
    for handle in range(2000):
        request = builders.make_request(handle, 2, tenant=str(rng.randrange(5)))
        admit(policy, [request])
        run(policy, [request], 0.5, float(handle))
        policy.finished(request, FinishReason.STOP)
    assert not policy._tenants
    assert not policy._num_live
    assert not counters._num_counted
    assert len(counters._given_s) == 5


@pytest.mark.parametrize("seed", range(2))
def test_two_that_wait_are_given_the_same(seed: int) -> None:
    """Whatever each sends: their counters are never further apart than BURST_S and a step.

    One sends long prompts and answers, the other short ones; both always have requests waiting.
    """
    rng = Random(seed)
    config = small_config(scheduling_policy="learned", fairness=True)
    harness = Harness(config, 200, seed=seed)
    counters: ServiceCounters | None = None
    tenants: dict[int, str] = {}
    furthest = 0.0
    for _ in range(600):
        for tenant, (num_prompt, num_output) in {"long": (40, 20), "short": (3, 4)}.items():
            while sum(tenants[handle] == tenant for handle in harness.live) < 6:
                prompt = [rng.randrange(100) for _ in range(num_prompt)]
                tenants[harness.add(prompt, num_output, tenant=tenant)] = tenant
        if counters is None:
            classes = harness.scheduler.policy
            assert isinstance(classes, PriorityClasses)
            (tenants_of_class,) = classes._classes.values()
            assert isinstance(tenants_of_class, FairTenants)
            counters = tenants_of_class._counters
        harness.step()
        furthest = max(furthest, abs(counters.given_s("long") - counters.given_s("short")))
    step_s = 16 * 0.01 + 0.5
    assert 0.0 < furthest <= BURST_S + step_s
    assert counters is not None
    assert min(counters.given_s("long"), counters.given_s("short")) > 20 * BURST_S
    for handle in harness.live:
        harness.abort(handle)
    harness.drain()


MACHINE = Machine(
    cost_model=CostModel(
        base_s=0.005, prefill_token_s=2e-5, decode_seq_s=1e-4, decode_context_s=1e-8
    ),
    num_device_blocks=2000,
)
LENGTHS = Lognormal(100, 0.8, 4, 800)


def mean_jct(workload: Workload, tenant: str, *, fairness: bool) -> float:
    """Return the mean completion time of a tenant's requests."""
    config = small_config(
        scheduling_policy="learned", fairness=fairness, max_num_seqs=8,
        max_num_batched_tokens=512, max_model_len=2000, block_size=16,
        eos_token_ids=frozenset({EOS_TOKEN_ID}),
    )  # fmt: skip
    outcome: Outcome = simulate(config, MACHINE, workload)
    own = np.array(workload.tenant) == tenant
    return float((outcome.finished_at - outcome.arrived_at)[own].mean())


@pytest.mark.parametrize(
    ("prompt", "output", "rate"),
    [
        pytest.param(LENGTHS, LENGTHS, 20.0, id="more of the same"),
        pytest.param(Fixed(1000), Fixed(20), 50.0, id="long prompts", marks=pytest.mark.slow),
        pytest.param(Fixed(5), Fixed(900), 4.0, id="long answers", marks=pytest.mark.slow),
    ],
)
def test_a_flood_does_not_double_the_completion_time_of_others(
    prompt: Fixed | Lognormal, output: Fixed | Lognormal, rate: float
) -> None:
    """A tenant within its share, beside one that sends what the machine cannot answer.

    Without fairness it is many times as late.
    """
    quiet = generate(np.random.default_rng(0), 40, 4.0, LENGTHS, LENGTHS)
    rng = np.random.default_rng(1)
    until_s = float(quiet.arrived_at[-1])
    num_flood = int(rate * until_s)
    flood = generate(rng, num_flood, 1.0, prompt, output).arriving(arrivals(rng, num_flood, rate))
    both = beside({"flood": flood, "quiet": quiet})
    alone_s = mean_jct(beside({"quiet": quiet}), "quiet", fairness=True)
    assert mean_jct(both, "quiet", fairness=True) < 2.0 * alone_s
    assert mean_jct(both, "quiet", fairness=False) > 3.0 * alone_s
