"""A machine on which a test can compute by hand, and workloads of a few rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fastserve.core.cost_model import CostModel
from fastserve.core.scheduler import Scheduler
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.sim_executor import EOS_TOKEN_ID
from fastserve.sim.simulator import Machine
from fastserve.sim.workload import Workload

COSTS = CostModel(
    base_s=0.5, prefill_token_s=0.01, decode_seq_s=0.02, decode_context_s=0.001, floor_s=0.05
)
MACHINE = Machine(cost_model=COSTS, num_device_blocks=64)
SWAPPING = Machine(
    cost_model=replace(COSTS, copy_base_s=0.02, copy_block_s=0.03),
    num_device_blocks=64,
    num_host_blocks=96,
    block_bytes=1000,
)
"""The same with a host tier behind a link on which ten blocks take half as long as a step."""


def small_config(**changes: Any) -> SchedulerConfig:
    """Return settings of the size of MACHINE."""
    settings: dict[str, Any] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "max_model_len": 128,
        "block_size": 4,
        "scheduling_policy": "fcfs",
        "eos_token_ids": frozenset({EOS_TOKEN_ID}),
        "is_strict": True,
    }
    return SchedulerConfig(**(settings | changes))


def make_workload(*rows: tuple[float, int, int], **columns: Any) -> Workload:
    """Return a workload from (arrived_at, prompt_tokens, output_tokens)."""
    arrived_at, prompt, output = zip(*rows, strict=True)
    return Workload(
        arrived_at=np.array(arrived_at, np.float64),
        prompt_tokens=np.array(prompt, np.int64),
        output_tokens=np.array(output, np.int64),
        **columns,
    )


class Checker:
    """An observer that asserts the scheduler's invariants after every step."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.num_checks = 0
        self.most_in_flight = 0

    def told(self, fact, now) -> None:
        """A fact alone changes nothing."""

    def planned(self, plan, can_compute, now) -> None:
        """Look at how many steps fly together."""
        self.most_in_flight = max(self.most_in_flight, len(self.scheduler._in_flight))

    def updated(self, output, updates, now) -> None:
        """Check everything."""
        self.scheduler.check()
        self.num_checks += 1
