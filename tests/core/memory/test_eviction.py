"""The preemption modes: who may lose KV to whom, and what must fit."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from fastserve.core.memory.eviction import RecomputeBudget
from fastserve.core.request import Handle
from tests.core.builders import one_second, prompt_of
from tests.core.harness import UNIT_COST, Harness, small_config


def run(mode: str, num_blocks: int, share: float = float("inf")) -> Harness:
    """Run six requests that do not fit together under an MLFQ of small quanta."""
    config = small_config(
        scheduling_policy="mlfq",
        preemption_mode=mode,
        max_recompute_share=share,
        max_num_seqs=2,
        starvation_limit=5.0,
    )
    harness = Harness(config, num_blocks, step_s=one_second)
    for handle in range(6):
        harness.add(prompt_of(handle, 20), 16)
    harness.drain()
    return harness


def test_recompute_takes_kv_and_computes_it_again() -> None:
    """The mode that the others are held against."""
    stats = run("recompute", 18).scheduler.stats()
    assert stats.num_preemptions > 0
    assert stats.num_recomputed_tokens > 0


def test_defer_takes_nothing_for_newcomers() -> None:
    """Where those who hold KV can all grow, preempting never costs a token."""
    harness = run("defer", 18)
    stats = harness.scheduler.stats()
    assert stats.num_preemptions > 0
    assert (
        stats.num_recomputed_tokens < run("recompute", 18).scheduler.stats().num_recomputed_tokens
    )
    newcomers = [
        {new.handle for new in plan.new_requests if new.epoch == 0}
        for plan in harness.executor.plans
    ]
    assert max(i for i, who in enumerate(newcomers) if who) > 6, "nobody was deferred"


@pytest.mark.parametrize("policy", ["mlfq", "fcfs"])
def test_small_requests_slip_in_where_large_ones_wait(policy: str) -> None:
    """What is free goes to whom it suffices, except where nobody may pass."""
    config = small_config(scheduling_policy=policy, preemption_mode="defer")
    harness = Harness(config, 13, step_s=one_second)
    for handle in range(2):
        harness.add(prompt_of(handle, 20), 4)
    for _ in range(3):
        harness.step()
    large = [harness.add(prompt_of(handle, 20), 4) for handle in range(2, 32)]
    small = harness.add(prompt_of(32, 3), 1)
    harness.drain()
    order = [new.handle for plan in harness.executor.plans for new in plan.new_requests]
    if policy == "fcfs":
        assert order == sorted(order)
    else:
        assert order.index(Handle(small)) < min(order.index(Handle(handle)) for handle in large)


def test_first_come_first_served_lets_nobody_pass_who_lost_their_kv() -> None:
    """With the budget spent, a request that has to begin again goes before those yet to begin."""
    config = small_config(preemption_mode="recompute", max_recompute_share=1e-6, max_num_seqs=8)
    harness = Harness(config, 20, step_s=one_second, seed=3)
    rng = random.Random(3)
    for handle in range(14):
        harness.add(prompt_of(handle, rng.randrange(3, 24)), rng.randrange(8, 36))
    harness.drain()
    begun = [
        (new.handle, new.epoch) for plan in harness.executor.plans for new in plan.new_requests
    ]
    assert harness.scheduler.stats().num_recomputed_tokens > 0
    # Request 10 has lost its KV twice when 12, which would fit, first comes up.
    assert begun.index((Handle(10), 2)) < begun.index((Handle(12), 0))


def test_ideal_moves_kv_for_nothing() -> None:
    """All stay alive, nothing is recomputed, and the requests of a step fit on the device."""
    harness = run("ideal", 18)
    stats = harness.scheduler.stats()
    assert stats.num_preemptions > 0
    assert stats.num_recomputed_tokens == 0
    assert max(blocks_held(harness)) <= 18


def blocks_held(harness: Harness) -> list[int]:
    """Return, for each plan, the blocks that its requests hold together."""
    tables: dict[int, int] = {}
    held = []
    for plan in harness.executor.plans:
        for work in plan.work:
            if work.block_ids:
                tables[work.handle] = work.table_from + len(work.block_ids)
        held.append(sum(tables[work.handle] for work in plan.work))
    return held


def test_the_budget_earns_a_share_and_works_off_its_debt() -> None:
    """It starts with a window's prefill, and spends what lost tokens take to compute again."""
    budget = RecomputeBudget(UNIT_COST, share=0.5, max_chunk=16, window=64)
    limit_s = UNIT_COST.prefill_s(64, 0, 16)
    cost_s = UNIT_COST.prefill_s(32, 0, 16)
    num_losses = 0
    while not budget.is_spent:
        budget.spend(32)
        num_losses += 1
    assert num_losses == math.ceil(limit_s / cost_s)
    debt_s = num_losses * cost_s - limit_s
    budget.earn(2 * debt_s)
    assert budget.is_spent
    budget.earn(0.01)
    assert not budget.is_spent


@pytest.mark.no_cover
@pytest.mark.parametrize("seed", range(30))
def test_recomputation_stays_within_its_share(seed: int) -> None:
    """Where everybody starves all the time, the budget spares at least half the recomputation."""
    config = small_config(
        scheduling_policy="skip-join-mlfq",
        max_recompute_share=0.05,
        max_num_seqs=3,
        starvation_limit=2.0,
        max_num_batched_tokens=8,
    )
    recomputed = []
    for settings in (config, dataclasses.replace(config, max_recompute_share=math.inf)):
        harness = Harness(settings, 20, seed=seed)
        rng = random.Random(seed)
        for handle in range(25):
            harness.add(prompt_of(handle, rng.randrange(4, 30)), rng.randrange(4, 30))
            for _ in range(rng.randrange(4)):
                harness.step()
        harness.drain()
        recomputed.append(harness.scheduler.stats().num_recomputed_tokens)
    assert recomputed[0] < 0.5 * recomputed[1]
