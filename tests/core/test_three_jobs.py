"""The paper's three-job example, by hand (docs/scheduling.md)."""

from __future__ import annotations

import pytest

from fastserve.core.build import build_scheduler
from fastserve.core.cost_model import CostModel
from fastserve.core.request import Arrival, SamplingParams
from fastserve.engine.engine import Engine
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.clock import VirtualClock
from tests.fake_executor import FakeExecutor

# A prefill of n tokens takes 0.42 + (n - 42) / 100 s, a decode 0.42 s.
COST = CostModel(base_s=0.42, prefill_token_s=0.01)
PROMPTS = (220, 35, 35)  # 2.62 s and 2 × 0.77 s


@pytest.mark.parametrize(
    ("policy", "finished", "mean"),
    [
        ("fcfs", (3.04, 4.23, 5.42), 4.23),
        ("mlfq", (4.58, 5.00, 5.42), 5.00),
        ("skip-join-mlfq", (5.42, 1.96, 2.38), 3.25),
        ("srpt", (5.42, 1.19, 2.38), 3.00),
    ],
)
def test_mean_latency(policy: str, finished: tuple[float, ...], mean: float) -> None:
    """Each policy finishes the three jobs when a hand calculation says so."""
    config = SchedulerConfig(
        max_num_seqs=1,
        max_num_batched_tokens=512,
        max_model_len=512,
        enable_chunked_prefill=False,
        scheduling_policy=policy,
        starvation_limit=1e9,
        is_strict=True,
    )
    clock = VirtualClock()
    executor = FakeExecutor(
        clock,
        config.block_size,
        step_s=lambda plan: COST.step_s((work.num_tokens, work.start) for work in plan.work),
    )
    lengths = {0: 2, 1: 2, 2: 2}
    scheduler = build_scheduler(config, COST, 64, lengths=lengths)
    engine = Engine(scheduler, executor, clock)
    for index, num_tokens in enumerate(PROMPTS):
        prompt = [1000 * index + position for position in range(num_tokens)]
        engine.add(Arrival(prompt, SamplingParams(max_tokens=2, seed=index)))
    ends: dict[int, float] = {}
    while scheduler.num_requests:
        for update in engine.step():
            if update.metrics is not None:
                ends[update.handle] = update.metrics.finished
        scheduler.check()
    assert tuple(ends[handle] for handle in range(3)) == pytest.approx(finished)
    assert sum(ends.values()) / 3 == pytest.approx(mean, abs=0.005)
