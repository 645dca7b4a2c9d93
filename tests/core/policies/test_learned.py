"""Learned: FCFS where nothing tells requests apart, bounds on what it lets others overtake."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest

from fastserve.core import outlook as outlook_module
from fastserve.core.build import policy_factory
from fastserve.core.cost_model import CostModel
from fastserve.core.messages import ExecutorOutput, Fact, RequestUpdate, SchedulerOutput
from fastserve.core.policies.learned import MAX_REFRESHES, Learned
from fastserve.core.policies.pricing import BEGUN_SHARE, BINS_PER_PRICE
from fastserve.core.policies.priority_classes import PriorityClasses
from fastserve.core.request import FinishReason, Request
from fastserve.core.scheduler import Scheduler
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim import generators
from fastserve.sim.simulator import Machine, Outcome, simulate
from fastserve.sim.workload import Workload
from tests.core.builders import make_request, note_step, order
from tests.core.harness import Harness
from tests.core.harness import small_config as harness_config
from tests.sim.machines import COSTS, Checker, small_config

AMPLE = Machine(cost_model=COSTS, num_device_blocks=8000)
MIXED = generators.Zipf(0.8, 1, 60)
MAX_ADVANCES = 20


def inner(scheduler: Scheduler) -> list[Learned]:
    """Return the policy of each class, the highest first."""
    assert isinstance(scheduler.policy, PriorityClasses)
    found = [scheduler.policy._classes[rank] for rank in scheduler.policy._ranks]
    assert all(isinstance(policy, Learned) for policy in found)
    return found  # type: ignore[return-value]


def plans(
    config: SchedulerConfig, machine: Machine, workload: Workload, policy: str
) -> list[list[tuple[int, int]]]:
    """Return (handle, tokens) of each plan that reaches the device."""
    seen: list[list[tuple[int, int]]] = []

    def on_step(plan: SchedulerOutput, stages: Sequence[tuple[float, float]]) -> None:
        seen.append([(int(work.handle), work.num_tokens) for work in plan.work])

    simulate(replace(config, scheduling_policy=policy), machine, workload, on_step=on_step)
    return seen


def as_sets(seen: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    """Return plans without the order inside each."""
    return [sorted(plan) for plan in seen]


# ── where it is FCFS ─────────────────────────────────────────────────────────────────────────


def alike(rng: Random, num_prompt: int, num_output: int, cap: int | None) -> Workload:
    """Return requests of one size at random times."""
    seed, count = rng.randrange(2**31), rng.choice((20, 60, 120))
    rate, cv = rng.choice((0.02, 0.1, 0.5, 2.0)), rng.choice((0.0, 1.0, 3.0))
    return Workload(
        arrived_at=generators.arrivals(np.random.default_rng(seed), count, rate, cv),
        prompt_tokens=np.full(count, num_prompt),
        output_tokens=np.full(count, num_output),
        max_tokens=None if cap is None else np.full(count, cap),
    )


@pytest.mark.no_cover
@pytest.mark.parametrize("mode", ["ideal", "recompute"])
@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("num_output", [1, 2, 30, 38])
def test_requests_that_are_all_alike_run_as_under_fcfs(
    num_output: int, is_chunked: bool, mode: str
) -> None:
    """From a cold start, capped or not: the same requests and tokens in every plan.

    Inside a plan the order may differ: between two that have begun a price may rise with age.
    A prompt that is split fills a step: of shorter ones packing begins a later one first when one
    token of the budget is left.
    """
    rng = Random(num_output)
    for _ in range(6):
        budget = rng.choice((20, 32)) if is_chunked else 128
        num_prompt = rng.choice((1, 40, 90)) if is_chunked else rng.choice((1, 2, 7, 40, 90))
        config = small_config(
            max_num_seqs=rng.choice((1, 2, 4, 16)),
            max_num_batched_tokens=budget,
            enable_chunked_prefill=is_chunked,
            preemption_mode=mode,
            enable_prefix_caching=False,
        )
        workload = alike(rng, num_prompt, num_output, rng.choice((None, num_output, 38)))
        learned = plans(config, AMPLE, workload, "learned")
        assert as_sets(learned) == as_sets(plans(config, AMPLE, workload, "fcfs"))


@pytest.mark.no_cover
@pytest.mark.parametrize("mode", ["ideal", "recompute", "defer"])
@pytest.mark.parametrize(("slots", "lookahead"), [(1, 0), (1, 1), (2, 0), (4, 0)])
def test_without_a_boost_every_plan_is_that_of_fcfs(slots: int, lookahead: int, mode: str) -> None:
    """Requests of all kinds, with memory or short of it, cached or not, whatever is learned."""
    rng = Random(slots)
    num_preemptions = 0
    for seed in range(6):
        drawn = np.random.default_rng(seed)
        is_chunked = rng.random() < 0.7
        config = small_config(
            max_num_seqs=rng.choice((1, 2, 4, 16)),
            max_num_batched_tokens=rng.choice((20, 32)) if is_chunked else 128,
            enable_chunked_prefill=is_chunked,
            enable_prefix_caching=rng.random() < 0.5,
            max_live_seqs=rng.choice((None, None, 3)),
            preemption_mode=mode,
            num_slots=slots,
            lookahead=lookahead,
            max_pause=rng.choice((0.0, 1.0)),
            boost=0.0,
        )
        machine = Machine(cost_model=COSTS, num_device_blocks=rng.choice((32, 40, 400)))
        workload = replace(
            generators.generate(drawn, 50, rng.choice((0.1, 0.5, 2.0)), MIXED, MIXED),
            client=tuple(rng.choice(("", "x", "y")) for _ in range(50)),
        )
        fcfs = plans(config, machine, workload, "fcfs")
        assert plans(config, machine, workload, "learned") == fcfs
        told = simulate(replace(config, scheduling_policy="learned"), machine, workload)
        num_preemptions += told.stats.num_preemptions
    assert num_preemptions > 0 or mode == "defer" or slots > 1


@pytest.mark.parametrize("seed", range(4))
def test_without_a_boost_priorities_are_those_of_fcfs(seed: int) -> None:
    """Three classes over one outlook, short of memory, requests lifted and sent back."""
    journals = []
    for policy in ("fcfs", "learned"):
        rng = Random(seed)
        config = harness_config(
            scheduling_policy=policy, boost=0.0, priority_aging=3.0, enable_prefix_caching=True
        )
        harness = Harness(config, 17, seed=seed)
        for _ in range(25):
            prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 30))]
            harness.add(prompt, rng.randrange(1, 30), priority=rng.randrange(3))
            for _ in range(rng.randrange(8)):
                if harness.is_busy:
                    harness.step()
        harness.drain()
        journals.append(harness.journal.sha256)
    assert journals[0] == journals[1]


@pytest.mark.parametrize("boost", [1e-3, 1.0, 1e6, 1e308, math.inf])
def test_any_boost_orders(boost: float) -> None:
    """From almost none to the index alone, keys are numbers."""
    config = small_config(scheduling_policy="learned", preemption_mode="ideal", boost=boost)
    workload = generators.generate(np.random.default_rng(1), 60, 0.5, MIXED, MIXED)
    outcome = simulate(config, AMPLE, workload)
    assert np.isfinite(outcome.finished_at).all()


# ── keys and bounds ──────────────────────────────────────────────────────────────────────────


class Auditor(Checker):
    """After each plan it makes every key anew from what is known, once all are up to date."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler)
        self.num_audits = self.num_overtaken = self.num_streams = 0

    def told(self, fact: Fact, now: float) -> None:
        """A fact changes keys of its own request only."""

    def planned(self, plan: SchedulerOutput | None, can_compute: bool, now: float) -> None:
        """Look at each class whose keys are up to date."""
        for policy in inner(self.scheduler):
            if policy.next_event(now) > now:
                self.audit(policy)

    def updated(self, output: ExecutorOutput, updates: Sequence[RequestUpdate], now: float) -> None:
        """Check the invariants of the scheduler."""
        self.scheduler.check()
        self.num_checks += 1

    def audit(self, policy: Learned) -> None:
        """Hold keys, order and bound to what the docstring says."""
        self.num_audits += 1
        keyed = [request for request in policy.ordered() if not policy._begun.is_lifted(request)]
        assert len(keyed) + len(list(policy._begun.lifted())) == len(policy._accounts)
        least_s, latest = math.inf, -math.inf
        by_line: dict[Any, int] = {}
        for request in keyed:
            account = policy._accounts[request.handle]
            assert (account.line is None) == (request.first_scheduled_at is not None) or (
                request.steps_in_flight > 0
            ), "it has begun once a step of it has landed"
            prices_s, least_price_s = self.prices(policy, request)
            keys = [request.arrived_at - self.boost(policy, price_s) for price_s in prices_s]
            own_key = policy.coldness(request, 0.0)[0]
            assert any(own_key == pytest.approx(key, abs=1e-9) for key in keys)
            least_s = min(least_s, least_price_s)
            if account.line is not None:
                assert by_line.get(account.kind, -1) < request.handle, "a line is in order"
                by_line[account.kind] = request.handle
            self.num_streams += request.num_output_tokens > 0
        keys = [policy.coldness(request, 0.0)[0] for request in keyed]
        assert keys == sorted(keys)
        bound_s = self.boost(policy, least_s)
        for request in keyed:
            assert latest <= request.arrived_at + bound_s + 1e-9
            self.num_overtaken += latest > request.arrived_at
            latest = max(latest, request.arrived_at)

    @staticmethod
    def prices(policy: Learned, request: Request) -> tuple[list[float], float]:
        """Return what its price may be, and the least that one of its kind can ever have.

        One that runs was priced when it had grown by `BINS_PER_PRICE`.
        """
        kind = policy._accounts[request.handle].kind
        answer = policy._outlook.answer(kind.labels, kind.max_tokens)
        token_s = policy._pricing.token_s(kind)
        last = answer.bin_at(2**30)
        least_s = BEGUN_SHARE * min(answer.index(k, 0.0, token_s) for k in range(last + 1))
        if policy._accounts[request.handle].line is not None:
            return [answer.index(0, kind.prefill_s, token_s)], least_s
        index = answer.bin_at(request.num_output_tokens)
        start = request.num_computed_tokens
        num_left = request.num_tokens - start
        prefill_s = COSTS.added_prefill_s(num_left, start) if num_left > 1 else 0.0
        bins = range(max(index - BINS_PER_PRICE + 1, 0), index + 1)
        return [BEGUN_SHARE * answer.index(k, prefill_s, token_s) for k in bins], least_s

    @staticmethod
    def boost(policy: Learned, price_s: float) -> float:
        """Return b(G)."""
        scale_s = policy._pricing.scale_s
        return -scale_s * math.log1p(-math.exp(-price_s / scale_s)) if scale_s else 0.0


def audited(config: SchedulerConfig, workload: Workload) -> tuple[Auditor, Outcome]:
    """Simulate on a machine with ample memory, with every key audited."""
    auditors: list[Auditor] = []

    def observers(scheduler: Scheduler) -> list[Auditor]:
        auditors.append(Auditor(scheduler))
        return auditors

    outcome = simulate(config, AMPLE, workload, observers=observers)
    return auditors[0], outcome


@pytest.mark.no_cover
@pytest.mark.parametrize("seed", range(4))
def test_keys_are_up_to_date_and_nobody_is_overtaken_by_much_later_ones(seed: int) -> None:
    """Every key is arrival - b(G) of what is known now, and b(G_min) bounds what overtakes."""
    drawn = np.random.default_rng(seed)
    workload = generators.generate(drawn, 120, 0.4, MIXED, MIXED)
    if seed % 2:
        workload = replace(workload, max_tokens=np.full(120, 64), client=("a", "b", "c") * 40)
    config = small_config(
        scheduling_policy="learned", preemption_mode="ideal", max_pause=(1e9, 30.0)[seed // 2]
    )
    auditor, outcome = audited(config, workload)
    assert auditor.num_audits > outcome.num_steps / 4
    assert auditor.num_overtaken > 100
    assert auditor.num_streams > 100


def test_a_stream_with_kv_pauses_no_longer_than_it_may() -> None:
    """In overload, with memory for all: one step beyond `max_pause_s`, where others pause long."""
    workload = generators.generate(np.random.default_rng(2), 150, 0.7, MIXED, MIXED)
    config = small_config(scheduling_policy="learned", preemption_mode="ideal", max_pause=20.0)
    steps_s: list[float] = []

    def on_step(plan: SchedulerOutput, stages: Sequence[tuple[float, float]]) -> None:
        steps_s.append(stages[-1][1] - stages[0][0])

    free = simulate(replace(config, max_pause=1e9), AMPLE, workload)
    outcome = simulate(config, AMPLE, workload, on_step=on_step)
    assert outcome.stats.num_preemptions > 0
    assert np.nanmax(free.max_gap_s) > 60.0
    # One step is under way when the pause is long enough, and one more gives the token.
    assert 19.0 < np.nanmax(outcome.max_gap_s) <= 20.0 + 2 * max(steps_s) + 1e-9


# ── accounts ─────────────────────────────────────────────────────────────────────────────────


def assert_empty(scheduler: Scheduler) -> None:
    """Assert that nothing of any request is left, nor work that is expected of it."""
    policies = inner(scheduler)
    for policy in policies:
        assert policy._outlook is policies[0]._outlook
        assert not policy._accounts
        assert not len(policy._begun)
        assert not policy._begun._watched
        assert not len(policy._begun._deadlines)
        assert not list(policy._lines)
        assert not list(policy._lines.lines())
    assert abs(policies[0]._outlook._work_s) < 1e-9


@pytest.mark.no_cover
def test_after_ten_thousand_requests_no_work_is_left() -> None:
    """Work that is expected comes and goes in parts, and their sum does not drift."""
    lengths = generators.Lognormal(10, 1.0, 1, 60)
    workload = generators.generate(np.random.default_rng(0), 10_000, 0.8, lengths, lengths)
    schedulers: list[Scheduler] = []

    def observers(scheduler: Scheduler) -> tuple[()]:
        schedulers.append(scheduler)
        return ()

    config = small_config(
        scheduling_policy="learned", preemption_mode="ideal", max_num_seqs=16, max_pause=5.0
    )
    outcome = simulate(config, AMPLE, workload, observers=observers)
    assert outcome.stats.num_preemptions > 0
    assert inner(schedulers[0])[0]._outlook.model.num_ended == 10_000
    assert_empty(schedulers[0])


STATES: dict[str, Callable[[Learned, Request], bool]] = {
    "waiting": lambda policy, request: policy._accounts[request.handle].line is not None,
    "part of a prompt": lambda policy, request: 0 < request.num_computed_tokens < 8,
    "stream": lambda policy, request: request.num_output_tokens > 0,
    "in flight": lambda policy, request: request.steps_in_flight > 0,
    "without KV": lambda policy, request: request.epoch > 0 and request.table is None,
    "lifted": lambda policy, request: policy._begun.is_lifted(request),
}


@pytest.mark.no_cover
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("ends", ["abort", "finish", "fail"])
def test_a_request_may_end_in_any_state(state: str, ends: str) -> None:
    """Three classes, short of memory, streams that pause: nothing of it is left behind."""
    num_ended = 0
    for seed in range(20):
        rng = Random(seed)
        config = harness_config(
            scheduling_policy="learned",
            max_pause=3.0,
            max_num_seqs=2,
            priority_aging=6.0,
            max_recompute_share=math.inf,
        )
        harness = Harness(config, 24, seed=seed)
        for _ in range(20):
            num_prompt = rng.choice((1, 2, 25))
            priority = rng.choice((0, 0, 0, 1, 2))
            harness.add(range(num_prompt), rng.choice((1, 3, 30)), priority=priority)
            for _ in range(rng.randrange(6)):
                if harness.is_busy:
                    harness.step()
                    num_ended += end_one(harness, STATES[state], ends)
        harness.drain()
        assert_empty(harness.scheduler)
    assert num_ended > 0


def end_one(harness: Harness, is_in: Callable[[Learned, Request], bool], ends: str) -> bool:
    """End the first request that is in a state, or let the next step fail while it is."""
    assert isinstance(harness.scheduler.policy, PriorityClasses)
    harness.executor.wake()
    harness.step()  # plans go out and nothing lands
    classes = harness.scheduler.policy._class_of
    for handle in harness.live:
        policy = harness.scheduler.policy._classes[classes[handle]]
        assert isinstance(policy, Learned)
        if is_in(policy, harness.request(handle)):
            if ends == "fail":
                harness.fail_next_step()
            else:
                (harness.abort if ends == "abort" else harness.finish)(handle)
            return True
    return False


# ── by hand ──────────────────────────────────────────────────────────────────────────────────

COST = CostModel(base_s=0.0, prefill_token_s=0.1, decode_seq_s=1.0)


def make_policies(count: int = 1, **changes: Any) -> list[Learned]:
    """Return policies that learn together; a token takes a second, one of a prompt a tenth."""
    config = harness_config(scheduling_policy="learned", max_model_len=4096, **changes)
    make = policy_factory(config, COST, 1000)
    policies = [make() for _ in range(count)]
    assert all(isinstance(policy, Learned) for policy in policies)
    return policies  # type: ignore[return-value]


def admit(policy: Learned, request: Request, at: float) -> Request:
    """Let a request arrive."""
    request.arrived_at = request.last_ran_at = at
    policy.admit(request, at)
    return request


def stream(policy: Learned, request: Request, now: float) -> None:
    """Let a step land that computed all that a request has, with KV."""
    request.table = request.table or object()  # type: ignore[assignment]
    request.num_computed_tokens = request.num_tokens
    request.append(5)
    note_step(policy, [request], 1.0, now)


def taught(policy: Learned, answers: dict[str, int]) -> None:
    """Let a policy see thirty answers of each client, and a queue that makes later ones wait."""
    handle = 10_000
    for client, num_tokens in answers.items():
        for _ in range(30):
            request = admit(policy, make_request(handle, client=client), 0.0)
            request.output_token_ids = [5] * num_tokens
            request.num_tokens += num_tokens
            policy.finished(request, FinishReason.STOP)
            handle += 1
    for _ in range(3):
        admit(policy, make_request(handle, client="long"), 0.0)
        handle += 1
    for _ in range(MAX_ADVANCES):
        policy.advance(0.0)
    for request in list(policy.ordered()):
        policy.finished(request, FinishReason.ERROR)


def test_who_was_answered_shortly_goes_ahead() -> None:
    """Clients of ten and of sixty tokens: the later and shorter leads, if it is not too late."""
    (policy,) = make_policies()
    taught(policy, {"long": 60, "short": 5})
    admit(policy, make_request(0, client="long"), 100.0)
    admit(policy, make_request(1, client="short"), 101.0)
    assert order(policy, 101.0) == [1, 0]
    admit(policy, make_request(2, client="short"), 100_000.0)
    assert order(policy, 101.0) == [1, 0, 2]


def test_more_kinds_than_are_kept_are_priced_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each plan makes one distribution at most, the last price is the end of it, and all are as
    they would be if every distribution were kept.
    """

    def priced(max_answers: int) -> list[int]:
        monkeypatch.setattr(outlook_module, "MAX_ANSWERS", max_answers)
        (policy,) = make_policies()
        taught(policy, {f"client {i}": round(600 / 1.3**i) for i in range(20)})
        outlook = policy._outlook
        for i in range(20):
            admit(policy, make_request(i, client=f"client {i}"), 100.0)
        outlook.renew()
        num_made, num_plans = outlook.num_made, 0
        while policy.next_event(100.0) == -math.inf:
            policy.advance(100.0)
            num_plans += 1
            assert outlook.num_made - num_made <= num_plans
            assert outlook.num_answers <= max_answers
        assert outlook.num_made - num_made == 20
        assert num_plans <= 20 + 20 / MAX_REFRESHES + 1
        return order(policy, 100.0)

    few = priced(8)
    assert few == priced(100)
    assert few != list(range(20))


def test_a_beginning_is_dearer_than_going_on() -> None:
    """Of two of a kind the later one goes on, once it has begun, if it came soon after."""
    (policy,) = make_policies()
    taught(policy, {"long": 60})
    admit(policy, make_request(0, client="long"), 100.0)
    second = admit(policy, make_request(1, client="long"), 100.0)
    assert order(policy, 100.0) == [0, 1]
    stream(policy, second, 101.0)
    assert order(policy, 101.0) == [1, 0]


def test_a_stream_that_paused_long_enough_leads_until_it_has_run_once() -> None:
    """At `max_pause` since it last ran, not before; then it is where its price puts it."""
    (policy,) = make_policies(max_pause=4.0)
    taught(policy, {"long": 60, "short": 5})
    old = admit(policy, make_request(0, client="long"), 100.0)
    stream(policy, old, 101.0)
    for handle in (1, 2):
        admit(policy, make_request(handle, client="short"), 101.0)
    while policy.next_event(104.9) < 104.9:
        policy.advance(104.9)
    assert order(policy, 104.9) == [1, 2, 0]
    assert policy.next_event(104.9) == 105.0
    assert order(policy, 105.0) == [0, 1, 2]
    assert policy.coldness(old, 105.0) == (-math.inf,)
    stream(policy, old, 106.0)
    assert order(policy, 106.0) == [1, 2, 0]
    assert order(policy, 109.9) == [1, 2, 0]
    assert order(policy, 110.0) == [0, 1, 2]


def test_streams_may_be_let_on_at_once() -> None:
    """A limit of no time lifts each stream in every plan, and looks at each once."""
    (policy,) = make_policies(max_pause=0.0)
    taught(policy, {"long": 60, "short": 5})
    old = admit(policy, make_request(0, client="long"), 100.0)
    stream(policy, old, 101.0)
    admit(policy, make_request(1, client="short"), 101.0)
    assert order(policy, 101.0) == [0, 1]
    assert order(policy, 101.0) == [0, 1]


def test_one_without_kv_is_not_lifted() -> None:
    """It would compute all of it again for one token; nor is one that runs right now."""
    (policy,) = make_policies(max_pause=4.0)
    taught(policy, {"long": 60, "short": 5})
    old = admit(policy, make_request(0, client="long"), 100.0)
    stream(policy, old, 101.0)
    admit(policy, make_request(1, client="short"), 101.0)
    table, old.table = old.table, None
    assert order(policy, 105.0) == [1, 0]
    old.table, old.steps_in_flight = table, 1
    assert order(policy, 109.0) == [1, 0]
    old.steps_in_flight = 0
    assert order(policy, 113.0) == [0, 1]


def test_one_that_comes_with_a_part_of_its_answer_has_begun() -> None:
    """Added again by a new engine: it stands beside the begun, and its whole answer is learned."""
    (policy,) = make_policies()
    taught(policy, {"long": 60})
    admit(policy, make_request(0, client="long"), 100.0)
    again = admit(policy, make_request(1, client="long", output_token_ids=range(57)), 100.0)
    assert order(policy, 100.0) == [1, 0]
    assert policy._accounts[1].line is None
    stream(policy, again, 101.0)
    total = policy._outlook.forecasts().answered_tokens
    policy.finished(again, FinishReason.LENGTH)
    assert policy._outlook.forecasts().answered_tokens == total + 58


@pytest.mark.parametrize("reason", FinishReason)
def test_an_answer_counts_as_long_as_it_became(reason: FinishReason) -> None:
    """Whatever ended it, but for a failure; one that never began says nothing."""
    (policy,) = make_policies()
    model = policy._outlook.model
    never, some = (admit(policy, make_request(handle), 0.0) for handle in (0, 1))
    stream(policy, some, 1.0)
    policy.finished(never, reason)
    assert model.num_ended == 0
    policy.finished(some, reason)
    assert model.num_ended == (reason is not FinishReason.ERROR)


def test_what_one_class_learns_another_plans_by() -> None:
    """Two policies with one outlook: ends in one change the order in the other."""
    first, second = make_policies(2)
    taught(first, {"long": 60, "short": 5})
    admit(second, make_request(0, client="long"), 100.0)
    admit(second, make_request(1, client="short"), 101.0)
    assert order(second, 101.0) == [1, 0]


def test_a_lifted_stream_stays_lifted_when_it_moves() -> None:
    """It waits for its token, whichever class it waits in; its deadline goes with it."""
    first, second = make_policies(2, max_pause=4.0)
    taught(first, {"long": 60, "short": 5})
    old = admit(first, make_request(0, client="long"), 100.0)
    stream(first, old, 101.0)
    admit(second, make_request(1, client="short"), 101.0)
    assert order(first, 105.0) == [0]
    first.move(old, second)
    assert order(first, 105.0) == []
    assert order(second, 105.0) == [0, 1]
    stream(second, old, 106.0)
    assert order(second, 106.0) == [1, 0]
    assert order(second, 110.0) == [0, 1]


def test_what_was_learned_is_spread_over_plans() -> None:
    """Of a thousand streams few are priced anew in one plan, and in the end all are."""
    (policy,) = make_policies(max_pause=1e9)
    for handle in range(1000):
        request = admit(policy, make_request(handle), 0.0)
        stream(policy, request, 1.0)
    policy.advance(1.0)
    while policy.next_event(1.0) <= 1.0:
        policy.advance(1.0)
    gone = list(policy.ordered())[500:]
    for request in gone:
        policy.finished(request, FinishReason.STOP)
    keys = {request.handle: policy.coldness(request, 1.0) for request in policy.ordered()}
    num_advances, most = 0, 0
    while policy.next_event(1.0) <= 1.0:
        policy.advance(1.0)
        now = {request.handle: policy.coldness(request, 1.0) for request in policy.ordered()}
        most = max(most, sum(now[handle] != keys[handle] for handle in now))
        keys, num_advances = now, num_advances + 1
    assert 0 < most < 50
    assert num_advances > 10
