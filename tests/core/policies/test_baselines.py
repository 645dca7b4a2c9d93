"""The paper's baselines, by hand: Orca, static batching, fixed priority, the artifact's MLFQ."""

from __future__ import annotations

from tests.core.builders import one_second, prompt_of
from tests.core.harness import Harness, small_config


def served(harness: Harness) -> list[set[int]]:
    """Return the requests of each plan."""
    return [{work.handle for work in plan.work} for plan in harness.executor.plans]


def test_orca_reserves_the_longest_output() -> None:
    """Requests that would fit by what they use wait for what the others might use."""
    harness = Harness(small_config(scheduling_policy="orca"), 8, step_s=one_second)
    for handle in range(3):
        harness.add(prompt_of(handle, 4), 12)  # 16 positions: 4 blocks, of which the prompt fills 1
    harness.drain()
    assert served(harness)[:12] == [{0, 1}] * 12
    assert all(2 in step for step in served(harness)[12:])
    assert harness.scheduler.stats().num_recomputed_tokens == 0


def test_static_batches_admit_no_other() -> None:
    """Places that come free stay empty until the longest of the batch has ended."""
    config = small_config(scheduling_policy="static", max_num_seqs=2)
    harness = Harness(config, 64, step_s=one_second)
    for handle, max_tokens in enumerate((2, 6, 3)):
        harness.add(prompt_of(handle, 4), max_tokens)
    harness.drain()
    assert served(harness) == [{0, 1}] * 2 + [{1}] * 4 + [{2}] * 3


def test_fixed_priority_prefers_short_prompts_for_life() -> None:
    """A shorter prompt preempts a longer one, however long its own answer."""
    config = small_config(scheduling_policy="fixed-priority", max_num_seqs=1)
    harness = Harness(config, 64, step_s=one_second)
    harness.add(prompt_of(0, 9), 5)
    harness.step()
    harness.step()
    harness.add(prompt_of(1, 3), 8)
    harness.drain()
    assert served(harness) == [{0}] * 2 + [{1}] * 8 + [{0}] * 3
    assert harness.scheduler.stats().num_preemptions == 1


def test_the_artifact_falls_one_level_and_promotes_late() -> None:
    """Demotion does not skip levels, and starvation is looked for every thousand steps only."""
    config = small_config(
        scheduling_policy="artifact-mlfq", max_num_seqs=1, starvation_limit=0.0, max_model_len=2100
    )
    harness = Harness(config, 600, step_s=one_second)
    first = harness.add(prompt_of(0, 4), 1200)
    harness.step()
    request = next(iter(harness.scheduler.cache.holders()))
    assert request.handle == first
    levels = harness.scheduler.policy.levels
    assert levels is not None
    joined = levels.level(request)
    harness.step()
    assert levels.level(request) <= joined + 1
    harness.add(prompt_of(1, 4), 900)
    steps = 0
    while harness.scheduler.stats().num_promotions == 0:
        harness.step()
        steps += 1
    assert steps > 900
    harness.drain()
