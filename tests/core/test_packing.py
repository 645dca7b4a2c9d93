"""Packing: budgets, claims, who may take KV from whom, and bounded waiting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

import pytest

from fastserve.core.messages import ExecutorOutput, Fact, RequestUpdate, SchedulerOutput
from fastserve.core.packing import SCAN_MARGIN
from fastserve.core.policies.fcfs import FCFS
from fastserve.core.policies.protocol import Coldness
from fastserve.core.policies.reservation import Reservation
from fastserve.core.request import Request
from tests.core.builders import one_second, prompt_of
from tests.core.harness import UNIT_COST, Harness, small_config
from tests.core.test_random_runs import run as random_run


def tokens_of(plan: SchedulerOutput) -> dict[int, int]:
    """Return the tokens that each request computes in a plan."""
    return {work.handle: work.num_tokens for work in plan.work}


@pytest.mark.no_cover
@pytest.mark.parametrize("batch", range(4))
def test_no_plan_exceeds_a_budget(batch: int) -> None:
    """Sequences and tokens of every plan stay within the limits, a stage's within its share."""
    for seed in range(batch * 40, batch * 40 + 40):
        harness = random_run(seed)
        config = harness.config
        for plan in harness.executor.plans:
            assert len(plan.work) <= config.max_num_seqs
            num_decodes = sum(work.num_tokens == 1 for work in plan.work)
            if config.enable_chunked_prefill:
                share = -(-config.max_num_batched_tokens // config.num_slots)
                assert plan.num_tokens <= max(share, config.max_num_seqs)
            else:
                assert plan.num_tokens - num_decodes <= config.max_num_batched_tokens


def test_decodes_come_first_and_chunks_fill_the_rest() -> None:
    """A decode is never crowded out by a prefill before it in the order."""
    harness = Harness(small_config(max_num_seqs=3, max_num_batched_tokens=8), 64, step_s=one_second)
    for handle in range(2):
        harness.add(prompt_of(handle, 3), 20)
    harness.step()
    harness.add(prompt_of(2, 30), 5)
    for _ in range(3):
        harness.step()
        assert tokens_of(harness.executor.plans[-1]) == {0: 1, 1: 1, 2: 6}
    harness.drain()


def test_an_unchunked_prefill_gets_in_beside_a_constant_stream_of_decodes() -> None:
    """A prompt as long as the budget runs at its first turn though decodes never stop."""
    config = small_config(max_num_seqs=4, max_num_batched_tokens=64, enable_chunked_prefill=False)
    harness = Harness(config, 400, step_s=one_second)
    for handle in range(3):
        harness.add(prompt_of(handle, 2), 40)
    for _ in range(4):
        harness.step()
    long = harness.add(prompt_of(3, 63), 1)
    harness.step()
    assert tokens_of(harness.executor.plans[-1]) == {0: 1, 1: 1, 2: 1, long: 63}
    harness.drain()


def test_unchunked_prefills_wait_for_a_budget_of_their_own() -> None:
    """Two long prompts do not share a step, and the second is the first of the next."""
    config = small_config(max_num_batched_tokens=64, enable_chunked_prefill=False)
    harness = Harness(config, 400, step_s=one_second)
    for handle in range(3):
        harness.add(prompt_of(handle, 40), 4)
    harness.step()
    harness.step()
    harness.step()
    plans = [tokens_of(plan) for plan in harness.executor.plans]
    assert plans == [{0: 40}, {0: 1, 1: 40}, {0: 1, 1: 1, 2: 40}]
    harness.drain()


@pytest.mark.parametrize(("num_requests", "num_slots"), [(5, 2), (8, 4), (3, 4), (1, 2)])
def test_stages_fill_evenly(num_requests: int, num_slots: int) -> None:
    """With several slots a plan takes at most its share of the requests."""
    config = small_config(max_num_seqs=8, max_num_batched_tokens=64, num_slots=num_slots)
    harness = Harness(config, 400, step_s=one_second)
    for handle in range(num_requests):
        harness.add(prompt_of(handle, 2), 6)
    harness.executor.wake()
    harness.step()
    share = -(-num_requests // num_slots)
    sizes = [len(run.plan.work) for run in harness.executor.running]
    assert max(sizes) <= share
    assert sum(sizes) == num_requests
    harness.drain()


def fill_pool(harness: Harness, num_requests: int, length: int) -> None:
    """Let requests in until they hold all the blocks there are."""
    for handle in range(num_requests):
        harness.add(prompt_of(handle, length), 8, priority=5)
    while harness.scheduler.cache.num_left:
        harness.step()


def test_the_head_takes_kv_from_anyone() -> None:
    """A request that heads the order computes in the very next plan, whoever holds the pool."""
    config = small_config(max_model_len=32, max_num_seqs=2, max_num_batched_tokens=32)
    harness = Harness(config, 8, step_s=one_second)
    fill_pool(harness, 2, 13)
    head = harness.add(prompt_of(2, 28), 4, priority=0)
    harness.step()
    assert tokens_of(harness.executor.plans[-1]).get(head) == 28
    assert sum(harness.request(handle).epoch for handle in (0, 1)) >= 1
    harness.drain()
    stats = harness.scheduler.stats()
    assert stats.num_preemptions > 0
    assert stats.num_recomputed_tokens > 0


def test_one_that_may_not_come_back_yet_does_where_no_other_asks_for_anything() -> None:
    """The reserve for those that begin is larger than the device, and its wait is not over."""
    config = small_config(
        max_model_len=32, max_num_batched_tokens=32, preemption_mode="reactive", is_strict=True
    )
    costs = replace(UNIT_COST, prefill_token_s=1.0, copy_block_s=0.001)
    harness = Harness(config, 8, 32, step_s=one_second, costs=costs, copy_s=lambda copy: 0.001)
    fill_pool(harness, 1, 24)
    away, swapper = harness.request(0), harness.scheduler.cache._swapper
    table = away.table
    assert table is not None
    assert swapper is not None
    head = harness.add(prompt_of(1, 28), 2, priority=0)
    while table.is_resident:
        harness.step()
    swapper._demand = 1000.0
    while head in harness.live:
        harness.step()
    wait_s = swapper.wait_s(len(table.on_host()))
    while not table.is_resident:
        swapper._demand = 1000.0
        harness.step()
    assert harness.clock.now() - away.last_ran_at < wait_s
    harness.drain()


def test_the_coldest_loses_its_kv_and_only_as_many_as_needed() -> None:
    """Of three holders the youngest is taken from, and the others go on undisturbed."""
    config = small_config(max_model_len=24, max_num_batched_tokens=32)
    harness = Harness(config, 9, step_s=one_second)
    for handle in range(3):
        harness.add(prompt_of(handle, 9), 3, priority=5)
    harness.step()
    harness.add(prompt_of(3, 12), 2, priority=0)
    harness.step()
    assert [harness.request(handle).epoch for handle in range(3)] == [0, 0, 1]
    assert tokens_of(harness.executor.plans[-1]) == {3: 12, 0: 1, 1: 1}
    harness.drain()


class Warm(FCFS):
    """First come first served but for one that goes last; some are needed soon all the same."""

    last = -1
    warm: frozenset[int] = frozenset()

    def ordered(self) -> Iterator[Request]:
        """Yield by arrival, one of them last."""
        return iter(sorted(super().ordered(), key=lambda request: request.handle == self.last))

    def coldness(self, request: Request, now: float) -> Coldness:
        """Return the least for the warm."""
        return (-1,) if request.handle in self.warm else super().coldness(request, now)


def test_only_the_head_takes_kv_from_those_needed_sooner() -> None:
    """The second of the order leaves a warm request alone; as the first it does not."""
    config = small_config(max_model_len=32, max_num_batched_tokens=32)
    policy = Warm()
    harness = Harness(config, 8, step_s=one_second, policy=policy)
    holder = harness.add(prompt_of(0, 17), 14)
    harness.step()
    head, second = harness.add(prompt_of(1, 5), 2), harness.add(prompt_of(2, 9), 3)
    policy.last, policy.warm = holder, frozenset((holder,))
    harness.step()
    assert tokens_of(harness.executor.plans[-1]) == {head: 5, holder: 1}
    assert harness.request(holder).epoch == 0
    harness.step()  # the head ends
    harness.step()
    assert second in tokens_of(harness.executor.plans[-1])
    harness.drain()


def test_holders_fill_a_step_that_the_scan_left_room_in() -> None:
    """Whoever holds KV may run though hundreds who cannot are before it in the order."""
    config = small_config(max_num_seqs=2, max_live_seqs=2)
    policy = Warm()
    harness = Harness(config, 400, step_s=one_second, policy=policy)
    for handle in range(2):
        harness.add(prompt_of(handle, 2), 12)
    harness.step()
    policy.warm = frozenset((0, 1))
    for handle in range(2, 202):
        harness.add(prompt_of(handle, 2), 1)
    policy.last = 1
    harness.step()
    assert tokens_of(harness.executor.plans[-1]) == {0: 1, 1: 1}
    harness.drain()


def test_nobody_takes_kv_from_those_before_it() -> None:
    """First come first served, and no room: the newcomer waits, the holders keep their KV."""
    config = small_config(max_model_len=32, max_num_batched_tokens=32)
    harness = Harness(config, 8, step_s=one_second)
    for handle in range(2):
        harness.add(prompt_of(handle, 13), 3)
    harness.step()
    late = harness.add(prompt_of(2, 17), 2)
    harness.step()
    assert late not in tokens_of(harness.executor.plans[-1])
    harness.drain()
    assert harness.scheduler.stats().num_recomputed_tokens == 0


@pytest.mark.parametrize(("spare_share", "begins"), [(0.0, True), (1.6, True), (1.7, False)])
def test_one_that_begins_leaves_room_to_each_that_runs_ahead(
    spare_share: float, begins: bool
) -> None:
    """Of twelve blocks two hold six, and the third leaves four: eight tokens to each of them."""
    config = small_config(max_model_len=32, max_num_batched_tokens=32)
    policy = FCFS(Reservation(spare_share=spare_share))
    harness = Harness(config, 12, step_s=one_second, policy=policy)
    for handle in range(2):
        harness.add(prompt_of(handle, 9), 4)
        harness.step()
    late = harness.add(prompt_of(2, 5), 8)
    harness.step()
    assert (late in tokens_of(harness.executor.plans[-1])) == begins
    harness.drain()
    assert harness.scheduler.stats().num_recomputed_tokens == 0


class Cold(Warm):
    """The one that goes last is the coldest, too."""

    def coldness(self, request: Request, now: float) -> Coldness:
        """Return the most for the last."""
        return (1e9,) if request.handle == self.last else super().coldness(request, now)


@pytest.mark.parametrize(("spare_share", "takes"), [(0.0, True), (0.1, False)])
def test_who_leaves_room_takes_no_kv_unless_it_leads(spare_share: float, takes: bool) -> None:
    """The second of the order waits for the last one to end; as the first it does not."""
    config = small_config(max_model_len=32, max_num_batched_tokens=32)
    policy = Cold(Reservation(spare_share=spare_share))
    harness = Harness(config, 8, step_s=one_second, policy=policy)
    holder = harness.add(prompt_of(0, 17), 14)
    harness.step()
    harness.add(prompt_of(1, 5), 2)
    second = harness.add(prompt_of(2, 13), 3)
    policy.last = holder
    harness.step()
    assert (second in tokens_of(harness.executor.plans[-1])) == takes
    assert (harness.request(holder).epoch == 1) == takes
    harness.step()  # the head ends
    harness.step()
    assert harness.request(holder).epoch == 1
    harness.drain()
    assert harness.scheduler.stats().num_recomputed_tokens > 0


@pytest.mark.no_cover
def test_a_recomputing_request_keeps_its_blocks_until_it_is_past_where_it_was() -> None:
    """Neither the head nor anybody else takes KV that would have to be computed a third time."""
    num_protected = 0
    for seed in range(120):
        lost: dict[int, int] = {}  # handle → tokens it had when it lost them
        for holders in traced_run(seed):
            for request, epoch, num_computed, num_lost in holders:
                was = lost.get(request.handle)
                if was is not None and was < epoch and epoch > 1:
                    raise AssertionError(f"seed {seed}: {request.handle} lost KV it recomputed")
                if epoch and num_computed <= num_lost:
                    lost[request.handle] = epoch
                    num_protected += 1
                else:
                    lost.pop(request.handle, None)
    assert num_protected > 1000


def traced_run(seed: int) -> list[list[tuple[Request, int, int, int]]]:
    """Run a crowded load and note after every turn where each holder of KV stands."""
    harness = crowded(seed)
    trace = []
    while harness.is_busy:
        harness.step()
        holders = [
            (request, request.epoch, request.num_computed_tokens, request.num_lost_tokens)
            for request in harness.scheduler.cache.holders()
        ]
        trace.append(holders)
    harness.check_at_rest()
    return trace


def crowded(seed: int, **changes: object) -> Harness:
    """Return a harness with more prompts than the pool holds and a hot-headed policy."""
    rng = Random(seed)
    slots, lookahead = ((1, 0), (1, 1), (2, 0))[seed % 3]
    settings: dict[str, object] = {
        "max_num_seqs": rng.choice((1, 2, 3)),
        "max_num_batched_tokens": rng.choice((4, 9)),
        "max_model_len": 24,
        "scheduling_policy": rng.choice(("mlfq", "skip-join-mlfq")),
        "starvation_limit": rng.choice((0.0, 0.5, 3.0)),
        "max_live_seqs": rng.choice((None, 2)),
        "max_recompute_share": float("inf"),  # what a budget adds is in test_preemption.py
        "num_slots": slots,
        "lookahead": lookahead,
    }
    harness = Harness(small_config(**(settings | changes)), rng.choice((6, 7, 9)), seed=seed)
    for handle in range(6):
        length = rng.randrange(1, 20)
        harness.add(prompt_of(handle, length), rng.randrange(1, 25 - length))
    return harness


@pytest.mark.no_cover
@pytest.mark.parametrize("batch", range(3))
def test_the_head_of_the_order_runs_within_the_bound(batch: int) -> None:
    """Bounded waiting of the first in the order.

    While a request stays first and does not compute, every plan computes tokens of somebody whom
    nobody may take KV from. So it computes in the next plan, or after at most as many plans as
    there are steps in flight plus positions that are protected when it becomes first: for each
    recomputing request those up to one past where it was.
    """
    num_waits = 0
    for seed in range(batch * 60, batch * 60 + 60):
        harness = crowded(seed)
        scheduler = harness.scheduler
        head: Request | None = None
        bound = num_plans = 0
        while harness.is_busy:
            scheduler.policy.advance(harness.clock.now())
            first = next(scheduler.policy.ordered(), None)
            if first is not head:
                head, num_plans = first, len(harness.executor.plans)
                bound = 1 + len(harness.executor.running)
                bound += harness.config.num_slots + harness.config.lookahead
                for request in scheduler.cache.holders():
                    if request.is_recomputing:
                        bound += request.num_lost_tokens + 1 - request.num_computed_tokens
            harness.step()
            if head is None:
                continue
            if head.handle not in scheduler._requests or head.steps_in_flight:
                head = None
                continue
            for position, plan in enumerate(harness.executor.plans[num_plans:]):
                if head.handle in tokens_of(plan):
                    num_plans += position + 1
                    bound = 1 + harness.config.num_slots + harness.config.lookahead
                    for request in scheduler.cache.holders():
                        if request.is_recomputing:
                            bound += request.num_lost_tokens + 1 - request.num_computed_tokens
            waited = len(harness.executor.plans) - num_plans
            num_waits += waited > 0
            assert waited <= bound, f"seed {seed}: {waited} plans, {scheduler._stalls.story()}"
        harness.check_at_rest()
    assert num_waits > 0


@pytest.mark.parametrize("num_seqs", [1, 3])
@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("steps_between_arrivals", [1, 2])
def test_waiting_is_bounded_by_the_starvation_limit(
    num_seqs: int, lookahead: int, steps_between_arrivals: int
) -> None:
    """A long request under a flood of short ones waits for α and for who is in level 0 then.

    It is promoted to the tail of level 0, whose quantum is the least iteration: everyone before
    it leaves with its first step, one more with lookahead. So it computes within
    α + (1 + lookahead) · (2 + ceil(requests in level 0 / sequences in a step)) steps, even in
    overload.
    """
    alpha = 12.0
    config = small_config(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=16,
        scheduling_policy="skip-join-mlfq",
        starvation_limit=alpha,
        lookahead=lookahead,
    )
    harness = Harness(config, 600, step_s=one_second)
    long = harness.add(prompt_of(0, 30), 34)
    number, longest, waited_since, num_ahead = 1, 0.0, 0.0, 0
    for turn in range(150):
        for _ in range(num_seqs if turn % steps_between_arrivals == 0 else 0):
            harness.add([number], 2)
            number += 1
        harness.step()
        now = harness.clock.now()
        if long in tokens_of(harness.executor.plans[-1]):
            longest, waited_since = max(longest, now - waited_since), now
        if now - waited_since <= alpha:
            num_ahead = harness.scheduler.stats().requests_by_level.get(0, 0)
        bound = (1 + lookahead) * (2 + -(-num_ahead // num_seqs))
        assert now - waited_since <= alpha + bound
    assert longest >= alpha
    assert harness.scheduler.stats().num_promotions > 0
    harness.drain()


@pytest.mark.parametrize("max_live", [1, 2, 5])
def test_seats_are_respected_and_passed_on(max_live: int) -> None:
    """Never more holders of KV than `max_live_seqs`, and the head takes a seat from the coldest."""
    config = small_config(max_live_seqs=max_live, scheduling_policy="mlfq", starvation_limit=2.0)
    harness = Harness(config, 400)
    peak = 0
    for handle in range(8):
        harness.add(prompt_of(handle, 6), 10)
        harness.step()
        peak = max(peak, harness.scheduler.cache.num_tables)
    harness.drain()  # the harness counts the seats after every step
    assert peak == min(max_live, 4) or peak == max_live
    assert harness.scheduler.stats().num_recomputed_tokens > 0 or max_live == 5


def test_nobody_is_evicted_for_a_request_that_cannot_run_now() -> None:
    """An unchunked prompt beyond what is left of the budget costs nobody a seat or KV."""
    config = small_config(
        max_num_seqs=4,
        max_num_batched_tokens=32,
        max_model_len=32,
        enable_chunked_prefill=False,
        max_live_seqs=2,
    )
    harness = Harness(config, 400, step_s=one_second)
    holder = harness.add(prompt_of(0, 2), 12, priority=9)
    harness.step()
    harness.add(prompt_of(1, 30), 1, priority=0)
    harness.add(prompt_of(2, 30), 1, priority=1)
    harness.step()
    assert tokens_of(harness.executor.plans[-1]) == {1: 30, holder: 1}
    assert harness.request(holder).epoch == 0
    harness.drain()


@pytest.mark.no_cover
def test_no_seat_stays_empty_while_a_request_could_run() -> None:
    """However many that may not come back yet stand before it in the order."""
    config = small_config(
        max_num_seqs=8, max_num_batched_tokens=64, scheduling_policy="skip-join-mlfq",
        starvation_limit=2.0, preemption_mode="proactive",
    )  # fmt: skip
    costs = replace(UNIT_COST, copy_base_s=0.5, copy_block_s=0.1)
    harness = Harness(config, 40, 2000, step_s=one_second, costs=costs)
    seats = Seats(harness)
    harness.engine.observers = (*harness.engine.observers, seats)
    for handle in range(250):
        harness.add(prompt_of(handle, 4), 30)
    harness.drain()
    assert seats.most_away > config.max_num_seqs + SCAN_MARGIN
    assert harness.scheduler.stats().num_swaps > 0


class Seats:
    """Watches that a plan with an empty seat leaves nobody out who could run."""

    def __init__(self, harness: Harness) -> None:
        self.most_away = 0
        self._harness = harness

    def told(self, fact: Fact, now: float) -> None:
        """A fact is no plan."""

    def planned(self, plan: SchedulerOutput | None, can_compute: bool, now: float) -> None:
        """Look at those who are not in a plan."""
        if plan is None or not can_compute:
            return
        live = self._harness.scheduler._requests.values()
        tables = [request.table for request in live if request.table is not None]
        self.most_away = max(self.most_away, sum(not table.is_resident for table in tables))
        if len(plan.work) < self._harness.config.max_num_seqs:
            left_out = {request.handle for request in live} - {work.handle for work in plan.work}
            assert not [each for each in live if each.handle in left_out and self._could_run(each)]

    def updated(self, output: ExecutorOutput, updates: Sequence[RequestUpdate], now: float) -> None:
        """What came of a step is no plan."""

    def _could_run(self, request: Request) -> bool:
        table = request.table
        if table is None or not table.is_resident or request.steps_in_flight:
            return False
        return request.num_scheduled_tokens < len(table.blocks) * self._harness.config.block_size
