"""The bound of a cache, and that a simulation comes to it where nothing is in its way."""

from __future__ import annotations

import random
from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given, settings

from experiments.prefix_hits import found_without_bounds
from fastserve.sim.simulator import simulate
from fastserve.sim.workload import HASH_ID_TOKENS, Workload
from tests.sim.machines import COSTS, MACHINE, make_workload, small_config

BLOCK = 16
PATHS = st.lists(st.tuples(st.text("ab", min_size=1, max_size=3), st.integers(1, 40)), min_size=1)


def workload_of(paths: list[tuple[str, int]]) -> Workload:
    """Return a row for each path: equal beginnings are equal blocks, some tokens stand behind."""
    known: dict[str, int] = {}
    ids = [
        tuple([known.setdefault(path[:end], len(known)) for end in range(1, len(path) + 1)])
        for path, _ in paths
    ]
    rows = [
        (1e4 * at, HASH_ID_TOKENS * len(path) + more, 3) for at, (path, more) in enumerate(paths)
    ]
    return make_workload(*rows, hash_ids=tuple(ids))


def test_what_was_there_before_is_found_up_to_the_last_token():
    """Whole blocks behind equal beginnings; of an equal prompt all but the block of its end."""
    trace = workload_of([("ab", 5), ("aa", 5), ("ab", 5), ("b", 5)])
    assert found_without_bounds(trace, BLOCK) == 512 + 1024
    whole = replace(trace, prompt_tokens=trace.prompt_tokens - 5)
    assert found_without_bounds(whole, BLOCK) == 512 + 1008


def cached(trace, num_device_blocks: int, num_host_blocks: int):
    """Return the statistics of requests of which each has ended before the next one comes."""
    config = small_config(
        max_num_batched_tokens=512,
        max_model_len=1760,
        block_size=BLOCK,
        enable_prefix_caching=True,
        preemption_mode="proactive",
    )
    machine = replace(
        MACHINE,
        num_device_blocks=num_device_blocks,
        num_host_blocks=num_host_blocks,
        cost_model=replace(COSTS, copy_base_s=1e-3, copy_block_s=1e-3),
    )
    return simulate(config, machine, trace).stats


@settings(max_examples=20, deadline=None)
@given(PATHS)
def test_a_pool_that_holds_everything_comes_to_the_bound(paths):
    """Nothing else is found, and what is not found is computed."""
    trace = workload_of(paths)
    stats = cached(trace, 20_000, 0)
    assert stats.num_cached_prompt_tokens == found_without_bounds(trace, BLOCK)
    total = stats.num_cached_prompt_tokens + stats.num_computed_prompt_tokens
    assert total == trace.prompt_tokens.sum()


def test_a_host_that_holds_everything_comes_to_the_bound():
    """Behind a device that holds one request, and finds little alone."""
    rng = random.Random(0)
    paths = [("".join(rng.choices("ab", k=rng.randint(1, 3))), rng.randint(1, 40))
             for _ in range(30)]  # fmt: skip
    trace = workload_of(paths)
    bound = found_without_bounds(trace, BLOCK)
    stats = cached(trace, 110, 20_000)
    assert stats.num_cached_prompt_tokens == bound
    assert stats.num_swapped_in_blocks > 0
    assert cached(trace, 110, 0).num_cached_prompt_tokens < 0.8 * bound
