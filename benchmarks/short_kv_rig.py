"""What short_kv runs its rows on: a loaded model, two tiers, and a link that is as slow as asked.

Rules: a rig is opened once and runs every arm, each under a scheduler of its own.
Must not know: which arms are compared, what is made of a run.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.small_model import NAMED
from benchmarks.timed_engine import Run, new_engine, run_live
from fastserve.core.cost_model import CostModel
from fastserve.engine.engine import Engine
from fastserve.engine.interfaces import Observer
from fastserve.launch.engine import open_engine
from fastserve.settings.engine import POLICIES, PREEMPTION_MODES, SWAPPING_MODES, EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.sim_executor import StepOverhead
from fastserve.sim.simulator import Machine
from fastserve.sim.workload import Workload
from fastserve.wire.engine_messages import EngineInfo

if TYPE_CHECKING:
    from fastserve.executor.copy_times import CopyTimes
    from fastserve.executor.local import LocalExecutor

MAX_NUM_SEQS = 16
SHORT_POOL, AMPLE_POOL = 32, 512  # blocks of 16 tokens
FITTING_SEQS = 4  # of mean size, in the short pool
SWAP_SPACE = 0.5  # GiB
TOKEN_COPY_SHARE = 1e-3  # of a decode step
UNPACED = "unpaced"


class Arm(NamedTuple):
    """What is compared. Without a host tier every mode recomputes."""

    policy: str
    mode: str
    is_paced: bool = True

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read policy/mode or policy/mode/unpaced; ConfigError for anything else."""
        policy, _, rest = text.partition("/")
        mode, _, pace = rest.partition("/")
        if policy not in POLICIES or mode not in PREEMPTION_MODES or pace not in ("", UNPACED):
            raise ConfigError(f"--arms: not policy/mode[/{UNPACED}]: {text}")
        return cls(policy, mode, not pace)

    def __str__(self) -> str:
        return "/".join((self.policy, self.mode, *([] if self.is_paced else [UNPACED])))


@dataclass(frozen=True, slots=True)
class Rig:
    """A loaded model, its two tiers and the link between them, measured."""

    engine: Engine
    info: EngineInfo
    link: CopyTimes

    @classmethod
    def open(cls, args: argparse.Namespace, folder: Path, bandwidth: float | None) -> Rig:
        """Load the model; `bandwidth` is in GB/s."""
        named = {"model": str(folder / args.model), "load_format": "dummy"}
        config = EngineConfig(
            **named if args.model in NAMED else {"model": args.model},
            num_threads=1,  # the other core is for the copies and the scheduler
            max_num_seqs=MAX_NUM_SEQS,
            num_device_blocks=AMPLE_POOL if args.low_load else SHORT_POOL,
            preemption_mode="proactive",
            swap_space=SWAP_SPACE,
            swap_bandwidth=bandwidth,
        )
        engine, info = open_engine(config)
        return cls(engine, info, local(engine).measure_copies())

    def config(self, arm: Arm) -> SchedulerConfig:
        """Return the settings of a scheduler."""
        return dataclasses.replace(
            self.engine.scheduler.config, scheduling_policy=arm.policy, preemption_mode=arm.mode
        )

    def machine(self, arm: Arm, cost: CostModel, overhead: StepOverhead) -> Machine:
        """Return costs and tiers: no host and no link for a mode that does not swap."""
        is_swapping, link = arm.mode in SWAPPING_MODES, self.link
        if is_swapping:
            cost = dataclasses.replace(cost, copy_base_s=link.base_s, copy_block_s=link.block_s)
        return Machine(
            cost_model=cost,
            num_device_blocks=self.info.num_device_blocks,
            num_host_blocks=self.info.num_host_blocks if is_swapping else 0,
            block_bytes=self.info.block_bytes,
            overhead=overhead,
        )

    def run(self, arm: Arm, cost: CostModel, workload: Workload, observer: Observer) -> Run:
        """Run a workload under a scheduler of its own."""
        machine = self.machine(arm, cost, StepOverhead())
        engine = new_engine(self.engine.executor, self.config(arm), machine)
        engine.observers = (observer,)
        return run_live(engine, workload)


def local(engine: Engine) -> LocalExecutor:
    """Return the executor as what it is."""
    from fastserve.executor.local import LocalExecutor

    assert isinstance(engine.executor, LocalExecutor)
    return engine.executor


def bandwidth_for(rig: Rig, cost: CostModel) -> float:
    """Return the GB/s at which a token's KV takes its share of a decode step of a full pool."""
    tokens = SHORT_POOL * rig.engine.scheduler.config.block_size
    step_s = cost.step_s([(1, tokens // FITTING_SEQS)] * FITTING_SEQS)
    token_bytes = rig.info.block_bytes / rig.engine.scheduler.config.block_size
    return token_bytes / (TOKEN_COPY_SHARE * step_s) / 1e9
