"""A thousand seeds of random load over the fake device: conservation, exactness, determinism."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from fastserve.core.request import FinishReason
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.config import SIMULATED_POLICIES, SIMULATED_PREEMPTION_MODES
from tests.core.harness import UNIT_COST, Harness

POLICIES = SIMULATED_POLICIES
PIPELINES = ((1, 0), (1, 1), (2, 0), (4, 0))


def run(seed: int) -> Harness:
    """Run one random load to its end."""
    rng = random.Random(seed)
    slots, lookahead = PIPELINES[seed % len(PIPELINES)]
    block_size = rng.choice((1, 3, 4))
    window = 48
    max_num_seqs = rng.choice((1, 2, 5))
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=window if seed % 5 == 0 else rng.choice((max_num_seqs + 1, 9, 20)),
        max_model_len=window,
        block_size=block_size,
        max_live_seqs=rng.choice((None, None, 1, 3)),
        enable_chunked_prefill=seed % 5 != 0,
        enable_prefix_caching=rng.random() < 0.5,
        scheduling_policy=POLICIES[seed // 4 % len(POLICIES)],
        starvation_limit=rng.choice((0.0, 1.0, 5.0, 1e9)),
        priority_aging=3.0,
        max_recompute_share=rng.choice((0.1, float("inf"))),
        preemption_mode=rng.choice(SIMULATED_PREEMPTION_MODES),
        num_slots=slots,
        lookahead=lookahead,
        is_strict=True,
    )
    num_blocks = -(-window // block_size) + rng.choice((0, 1, 5, 40))
    lengths: dict[int, int] = {}
    chances = random.Random(seed)
    share_failing = chances.choice((0.0, 0.0, 0.2))
    harness = Harness(
        config,
        num_blocks,
        chances.choice((0, 2, 10, 10, 200)),
        seed=seed,
        lengths=lengths,
        costs=replace(
            UNIT_COST,
            copy_base_s=chances.choice((0.0, 0.01)),
            copy_block_s=chances.choice((1e-4, 0.01, 0.2)),
        ),
        copy_s=lambda copy: chances.uniform(0.0, 3.0),
        copy_fails=lambda copy: chances.random() < share_failing,
    )
    shared = [rng.randrange(100) for _ in range(window)]
    for handle in range(rng.randrange(1, 14)):
        num_prompt = rng.randrange(1, 30)
        max_tokens = rng.randrange(1, window - num_prompt + 1)
        cut = rng.randrange(num_prompt + 1)
        prompt = shared[:cut] + [rng.randrange(100) for _ in range(num_prompt - cut)]
        lengths[handle] = max_tokens
        harness.add(prompt, max_tokens, priority=rng.choice((0, 0, 0, 1)))
        for _ in range(rng.choice((0, 0, 1, 6))):
            if harness.executor.running or harness.scheduler.num_requests:
                harness.step()
        live = harness.live
        if live and rng.random() < 0.15:
            harness.abort(rng.choice(live))
        elif live and rng.random() < 0.1:
            harness.finish(rng.choice(live))
        harness.scheduler.check()
    harness.drain()
    return harness


@pytest.mark.parametrize("batch", range(20))
def test_every_seed_is_exact_and_conserves_blocks(batch: int) -> None:
    """No run leaks a block, loses or repeats a terminal event, or yields a wrong token."""
    num_preemptions = num_recomputed = num_dropped = num_swaps = num_failed = 0
    for seed in range(batch * 50, batch * 50 + 50):
        harness = run(seed)
        stats = harness.scheduler.stats()
        assert stats.num_stalls == 0
        num_preemptions += stats.num_preemptions
        num_recomputed += stats.num_recomputed_tokens
        num_dropped += stats.num_dropped_samples
        num_swaps += stats.num_swaps
        num_failed += stats.num_failed_copies
        reasons = {expected.finish_reason for expected in harness.expected.values()}
        assert reasons <= {FinishReason.LENGTH, FinishReason.ABORT, FinishReason.STOP}
    assert num_preemptions > 0
    assert num_recomputed > 0
    assert num_swaps > 0
    assert num_failed > 0


def test_same_seed_same_journal() -> None:
    """A run repeats itself to the bit."""
    assert run(17).journal.sha256 == run(17).journal.sha256
    assert run(17).journal.sha256 != run(18).journal.sha256
