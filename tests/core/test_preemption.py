"""The preemption modes: who may lose KV to whom, and what must fit."""

from __future__ import annotations

from fastserve.core.output import SchedulerOutput
from tests.core.harness import Harness, small_config


def one_second(plan: SchedulerOutput) -> float:
    """Every step takes a second."""
    return 1.0


def prompt_of(handle: int, length: int) -> list[int]:
    """Return ids that no other handle has."""
    return [1000 * (handle + 1) + position for position in range(length)]


def run(mode: str, num_blocks: int) -> Harness:
    """Run six requests that do not fit together under an MLFQ of small quanta."""
    config = small_config(
        scheduling_policy="mlfq", preemption_mode=mode, max_num_seqs=2, starvation_limit=5.0
    )
    harness = Harness(config, num_blocks, step_s=one_second)
    for handle in range(6):
        harness.add(prompt_of(handle, 20), 16)
    harness.drain()
    return harness


def test_recompute_takes_kv_and_computes_it_again() -> None:
    """The mode that the others are held against."""
    stats = run("recompute", 18).scheduler.stats(0.0)
    assert stats.num_preemptions > 0
    assert stats.num_recomputed_tokens > 0


def test_defer_takes_nothing_for_newcomers() -> None:
    """Where those who hold KV can all grow, preempting never costs a token."""
    harness = run("defer", 18)
    stats = harness.scheduler.stats(0.0)
    assert stats.num_preemptions > 0
    assert (
        stats.num_recomputed_tokens
        < run("recompute", 18).scheduler.stats(0.0).num_recomputed_tokens
    )
    newcomers = [
        {new.request for new in plan.new_requests if new.epoch == 0}
        for plan in harness.executor.plans
    ]
    assert max(i for i, who in enumerate(newcomers) if who) > 6, "nobody was deferred"


def test_ideal_moves_kv_for_nothing() -> None:
    """All stay alive, nothing is recomputed, and the requests of a step fit on the device."""
    harness = run("ideal", 18)
    stats = harness.scheduler.stats(0.0)
    assert stats.num_preemptions > 0
    assert stats.num_recomputed_tokens == 0
    tables: dict[int, int] = {}
    for plan in harness.executor.plans:
        for work in plan.work:
            tables[work.request] = (
                work.table_from + len(work.block_ids) if work.block_ids else (tables[work.request])
            )
        assert sum(tables[work.request] for work in plan.work) <= 18
