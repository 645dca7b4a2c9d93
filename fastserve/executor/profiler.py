"""Measures step times of a loaded model.

Rules: real plans, before the model serves: prefills of several lengths and starts, decodes of
several batch sizes and contexts. Must not know: what carries a plan out, the scheduler, requests of
users, what becomes of the times.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from fastserve.core.cost_model import TERMS
from fastserve.core.messages import NewRequest, SchedulerOutput, StepDone, Work
from fastserve.core.request import Handle, SamplingParams
from fastserve.executor.facts import Setup
from fastserve.executor.fitting import Measurement, Shares

TIME_LIMIT_S = 6.0
"""No further kind of step is begun after this; the first ones suffice for a fit."""
REPEATS = 5
MEMORY_LIMIT = 128 * 2**20
"""Bytes of KV to touch, unless one full window needs more: a pool is mapped as it is used."""

Run = Callable[[SchedulerOutput], StepDone]
"""Carries out one plan and waits for its end."""


def kinds_of_steps(setup: Setup) -> list[Shares]:
    """Return the steps to measure: from one decode to the longest prefill that fits."""
    facts, limits = setup.facts, setup.facts.limits
    block_size = setup.config.block_size
    num_blocks = num_profiled_blocks(setup)
    room = min(facts.max_model_len - 1, num_blocks * block_size)
    longest = max(min(limits.max_num_batched_tokens, room), 1)
    lengths = sorted({max(longest >> shift, 1) for shift in (0, 1, 2, 4, 6)})
    contexts = sorted({max(room >> shift, 1) for shift in (0, 1, 2, 3, 5)})
    sizes = {1, 2, 4, 8, 16, 64, 256, limits.max_num_seqs}
    batches = sorted(size for size in sizes if size <= limits.max_num_seqs)

    kinds: list[Shares] = [((length, 0),) for length in lengths if length > 1]
    kinds += [((length, room - length),) for length in lengths[:-1] if 1 < length < room]
    for batch in batches:
        for context in contexts:
            kinds.append(tuple((1, start) for start in _spread(context, batch, room)))
    half = lengths[-1] // 2
    if half > 1 and limits.max_num_seqs >= 4:
        kinds.append((*((1, contexts[0] - 1),) * 4, (half, 0)))
    return [kind for kind in kinds if _num_blocks(kind, block_size) <= num_blocks]


def _spread(context: int, batch: int, room: int) -> list[int]:
    """Return starts whose contexts lie between a quarter of `context` and what mirrors it.

    No batch of real requests is of one length, and some attention pays for the longest in it.
    """
    if batch == 1:
        return [context - 1]
    contexts = (context // 4 + 3 * context * index // (2 * (batch - 1)) for index in range(batch))
    return [min(max(length, 1), room) - 1 for length in contexts]


def num_profiled_blocks(setup: Setup) -> int:
    """Return how many blocks, from the start of the pool, a profile may touch."""
    window = -(-setup.facts.max_model_len // setup.config.block_size)
    blocks = max(MEMORY_LIMIT // setup.facts.block_bytes, window)
    return min(blocks, setup.facts.num_device_blocks)


def measure(setup: Setup, run: Run, on_progress: Callable[[str, float], None]) -> list[Measurement]:
    """Run every kind of step a few times; stops early when it takes too long.

    The first `num_profiled_blocks` of the pool must be real memory by now.
    """
    # Spread by the golden ratio: cut short, what was measured still covers every sort of step.
    kinds = [
        kind
        for _, kind in sorted(
            (index * 0.618 % 1, kind) for index, kind in enumerate(kinds_of_steps(setup))
        )
    ]
    on_progress("measuring step times", 0.0)
    block_size = setup.config.block_size
    run_step(run, kinds[0], block_size)  # the first step ever pays for allocations
    begun = time.monotonic()
    measurements: list[Measurement] = []
    for index, kind in enumerate(kinds):
        is_late = time.monotonic() - begun > TIME_LIMIT_S
        if is_late and len(measurements) > len(TERMS):
            break
        run_step(run, kind, block_size)  # warms up this shape
        times = [run_step(run, kind, block_size)]
        while len(times) < REPEATS and sum(times) < TIME_LIMIT_S / 40:
            times.append(run_step(run, kind, block_size))
        measurements.append(Measurement(kind, float(np.median(times))))
        on_progress("measuring step times", (index + 1) / len(kinds))
    on_progress("measuring step times", 1.0)
    return measurements


def run_step(run: Run, shares: Shares, block_size: int) -> float:
    """Run one step of made-up requests on blocks from the start of the pool; returns seconds."""
    params = SamplingParams(temperature=0.0)
    new, works = [], []
    next_block = 0
    for index, (num_tokens, start) in enumerate(shares):
        handle = Handle(-1 - index)  # no request of the scheduler has a negative handle
        blocks = tuple(range(next_block, next_block - (-(start + num_tokens) // block_size)))
        next_block += len(blocks)
        new.append(NewRequest(handle, 0, start + num_tokens, params, (0,) * start))
        works.append(Work(handle, 0, start, num_tokens, (0,) * num_tokens, 0, blocks, True, "last"))
    seconds = run(SchedulerOutput(-1, tuple(new), tuple(works))).device_s
    run(SchedulerOutput(-1, (), (), forget=tuple(item.handle for item in new)))
    return seconds


def _num_blocks(shares: Shares, block_size: int) -> int:
    return sum(-(-(start + num_tokens) // block_size) for num_tokens, start in shares)
