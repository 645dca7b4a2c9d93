"""Four hundred seeds of random load over the fake device: conservation, exactness, determinism."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from fastserve.core.request import FinishReason
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.config import SIMULATED_POLICIES, SIMULATED_PREEMPTION_MODES
from tests.core.harness import UNIT_COST, Harness
from tests.core.watched_cache import Watch, WatchedCache

POLICIES = SIMULATED_POLICIES
PIPELINES = ((1, 0), (1, 1), (2, 0), (4, 0))
WINDOW = 48
SWAPPING_MODES = ("proactive", "proactive-by-level", "reactive")


def random_config(seed: int, rng: random.Random) -> SchedulerConfig:
    """Return settings of any kind; each policy meets each pipeline."""
    slots, lookahead = PIPELINES[seed % len(PIPELINES)]
    max_num_seqs = rng.choice((1, 2, 5))
    policy = POLICIES[seed // 4 % len(POLICIES)]
    return SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=WINDOW if seed % 5 == 0 else rng.choice((max_num_seqs + 1, 9, 20)),
        max_model_len=WINDOW,
        block_size=rng.choice((1, 3, 4)),
        max_live_seqs=rng.choice((None, None, 1, 3)),
        enable_chunked_prefill=seed % 5 != 0,
        enable_prefix_caching=rng.random() < 0.5,
        scheduling_policy=policy,
        fairness=policy == "learned" and seed // (4 * len(POLICIES)) % 2 == 1,
        starvation_limit=rng.choice((0.0, 1.0, 5.0, 1e9)),
        max_pause=rng.choice((0.5, 5.0, 60.0)),
        priority_aging=3.0,
        max_recompute_share=rng.choice((0.1, float("inf"))),
        preemption_mode=rng.choice((*SIMULATED_PREEMPTION_MODES, *SWAPPING_MODES)),
        write_through=rng.random() < 0.7,
        num_slots=slots,
        lookahead=lookahead,
        is_strict=True,
    )


def random_machine(seed: int, lengths: dict[int, int]) -> tuple[Harness, random.Random]:
    """Return an empty machine of any size, whose link reorders, delays, fails, or is broken."""
    rng = random.Random(seed)
    config = random_config(seed, rng)
    share_failing = rng.choice((0.0, 0.0, 0.2, 1.0))
    longest_s = rng.choice((0.0, 1.0, 3.0, 30.0))
    harness = Harness(
        config,
        -(-WINDOW // config.block_size) + rng.choice((0, 1, 5, 40)),
        rng.choice((0, 1, 2, 10, 10, 200)),
        seed=seed,
        lengths=lengths,
        costs=replace(
            UNIT_COST,
            copy_base_s=rng.choice((0.0, 0.01)),
            copy_block_s=rng.choice((1e-4, 0.01, 0.2)),
        ),
        copy_s=lambda copy: rng.uniform(0.0, longest_s),
        copy_fails=lambda copy: rng.random() < share_failing,
    )
    return harness, rng


def run(seed: int) -> Harness:
    """Run one random load to its end."""
    lengths: dict[int, int] = {}
    harness, rng = random_machine(seed, lengths)
    WatchedCache.over(harness.scheduler.cache)
    shared = [rng.randrange(100) for _ in range(WINDOW)]
    for _ in range(rng.randrange(1, 12)):
        num_prompt = rng.randrange(1, 30)
        cut = rng.randrange(num_prompt + 1)
        prompt = shared[:cut] + [rng.randrange(100) for _ in range(num_prompt - cut)]
        for _ in range(rng.choice((1, 1, 1, 3))):  # as many choices of one prompt
            max_tokens = rng.randrange(1, WINDOW - num_prompt + 1)
            lengths[len(harness.expected)] = max_tokens
            tenant = f"tenant {len(harness.expected) % 3}"
            harness.add(prompt, max_tokens, priority=rng.choice((0, 0, 0, 1)), tenant=tenant)
        if rng.random() < 0.03:
            harness.fail_next_step()
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


def watch_of(harness: Harness) -> Watch:
    """Return what was seen of the KV memory of a run."""
    cache = harness.scheduler.cache
    assert isinstance(cache, WatchedCache)
    return cache.watch


SEEN = (
    "num_preemptions",
    "num_recomputed_tokens",
    "num_dropped_samples",
    "num_swaps",
    "num_swapped_out_blocks",
    "num_swapped_in_blocks",
    "num_saved_blocks",
    "num_clean_blocks",
    "num_failed_copies",
)
WATCHED = (
    "num_partial_swaps",
    "num_kept_partly",
    "num_head_stands",
)
RARE = ("num_stays", "num_shared_loads", "num_put_off", "num_early", "num_due", "num_left_over")
TIGHT_STATS = (
    "num_swaps",
    "num_swapped_out_blocks",
    "num_swapped_in_blocks",
    "num_saved_blocks",
    "num_fetched_blocks",
    "num_clean_blocks",
)


@pytest.mark.no_cover
@pytest.mark.parametrize("batch", range(8))
def test_every_seed_is_exact_and_conserves_blocks(batch: int) -> None:
    """No run leaks a block, loses or repeats a terminal event, or yields a wrong token."""
    seen: Counter[str] = Counter()
    for seed in range(batch * 50, batch * 50 + 50):
        harness = run(seed)
        stats, watch = harness.scheduler.stats(), watch_of(harness)
        assert stats.num_stalls == 0
        seen.update({name: getattr(stats, name) for name in SEEN})
        seen.update({name: getattr(watch, name) for name in WATCHED})
        reasons = {expected.finish_reason for expected in harness.expected.values()}
        assert None not in reasons
        assert FinishReason.ERROR not in reasons or harness.num_errors
    assert not [name for name in (*SEEN, *WATCHED) if not seen[name]], "not put to the test"


def tight_run(seed: int, policy: str, *, is_chunked: bool = True) -> Harness:
    """Run a load on a device that holds two or three requests, with a link that keeps up."""
    rng = random.Random(seed)
    slots, lookahead = PIPELINES[seed % len(PIPELINES)]
    config = SchedulerConfig(
        max_num_seqs=3,
        max_num_batched_tokens=12 if is_chunked else WINDOW,
        max_model_len=WINDOW,
        block_size=4,
        enable_chunked_prefill=is_chunked,
        enable_prefix_caching=True,
        scheduling_policy=policy,
        starvation_limit=4.0,
        max_pause=4.0,
        priority_aging=3.0,
        preemption_mode="proactive",
        num_slots=slots,
        lookahead=lookahead,
        is_strict=True,
    )
    harness = Harness(
        config,
        16,
        40,
        seed=seed,
        costs=replace(UNIT_COST, prefill_token_s=0.2, copy_base_s=0.01, copy_block_s=0.02),
        copy_s=lambda copy: rng.uniform(0.01, 1.5),
    )
    WatchedCache.over(harness.scheduler.cache)
    shared = [rng.randrange(100) for _ in range(12)]
    for number in range(14):
        own = [1000 * number + position for position in range(rng.randrange(1, 14))]
        prompt = shared * (rng.random() < 0.6) + own
        for _ in range(rng.choice((1, 1, 2))):
            max_tokens = rng.randrange(2, WINDOW - len(prompt))
            harness.add(prompt, max_tokens, priority=rng.choice((0, 0, 1, 2)))
        for _ in range(rng.choice((1, 4, 20))):
            if harness.is_busy:
                harness.step()
    harness.drain()
    return harness


@pytest.mark.no_cover
@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("policy", ["learned", "skip-join-mlfq", "fcfs"])
def test_priorities_and_policies_swap_what_they_preempt(policy: str, is_chunked: bool) -> None:
    """In every order requests come back exact, and nobody waits for ever."""
    seen: Counter[str] = Counter()
    for seed in range(12):
        harness = tight_run(seed, policy, is_chunked=is_chunked)
        stats, watch = harness.scheduler.stats(), watch_of(harness)
        assert {expected.finish_reason for expected in harness.expected.values()} == {"length"}
        seen.update({name: getattr(stats, name) for name in TIGHT_STATS})
        seen.update({name: getattr(watch, name) for name in (*WATCHED, *RARE)})
    assert not [name for name, count in seen.items() if not count], "not put to the test"


def test_same_seed_same_journal() -> None:
    """A run repeats itself to the bit."""
    assert run(17).journal.sha256 == run(17).journal.sha256
    assert run(17).journal.sha256 != run(18).journal.sha256
