"""Rows of few long answers among short ones, whose KV is short where a pool is small.

Rules: the sums are the same for every seed, the order and the gaps are drawn.
Must not know: policies, machines.
"""

from __future__ import annotations

import numpy as np

from fastserve.sim.generators import arrivals
from fastserve.sim.workload import Workload

PROMPT_TOKENS, SHORT_TOKENS, LONG_TOKENS = (50, 100), (8, 32), (150, 300)
LONG_SHARE = 0.2


def draw(num_requests: int, rate: float, seed: int) -> Workload:
    """Return rows whose lengths are spread evenly over their ranges, in random order.

    Their mean, and that of the gaps between them, is the same for every seed.
    """
    rng = np.random.default_rng(seed)
    num_long = round(LONG_SHARE * num_requests)
    longs = np.linspace(*LONG_TOKENS, num_long)
    shorts = np.linspace(*SHORT_TOKENS, num_requests - num_long)
    prompts, outputs = (
        rng.permutation(lengths.round().astype(np.int64))
        for lengths in (np.linspace(*PROMPT_TOKENS, num_requests), np.concatenate((longs, shorts)))
    )
    due = arrivals(rng, num_requests, 1.0)
    workload = Workload(arrived_at=due - due[0], prompt_tokens=prompts, output_tokens=outputs)
    return workload.faster(rate / workload.rate)
