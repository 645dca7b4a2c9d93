"""Opens tiny models over several ranks, and runs the same requests on any executor."""

from __future__ import annotations

import dataclasses
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastserve.core.build import build_scheduler
from fastserve.core.cost_model import CostModel
from fastserve.core.messages import RequestUpdate, Sample, SchedulerOutput, SchedulerStats
from fastserve.core.request import Arrival, Handle, SamplingParams
from fastserve.engine.engine import Engine, MonotonicClock
from fastserve.executor.distributed import DistributedExecutor
from fastserve.executor.local import LocalExecutor
from fastserve.executor.starting import ChildStarter
from fastserve.settings.engine import EngineConfig
from fastserve.settings.scheduler import SchedulerConfig
from tests.checkpoints import EOS_TOKEN_ID, VOCAB_SIZE

COMMAND = (sys.executable, "-P", "-m", "fastserve.launch", "--rank-fd")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
BLOCK_SIZE = 4
WINDOW = 128
NUM_DEVICE_BLOCKS = 40
NUM_HOST_BLOCKS = 60
COSTS = CostModel(
    base_s=1e-3, prefill_token_s=1e-5, decode_seq_s=1e-5, copy_base_s=1e-5, copy_block_s=1e-6
)


def config_of(path: Path, tp: int = 1, pp: int = 1, **settings: Any) -> EngineConfig:
    """Return the settings of a tiny model over so many ranks."""
    defaults: dict[str, Any] = {
        "model": str(path),
        "device": "cpu",
        "dtype": "float32",
        "num_threads": 1,
        "block_size": BLOCK_SIZE,
        "num_device_blocks": NUM_DEVICE_BLOCKS,
        "max_model_len": WINDOW,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "preemption_mode": "proactive",
        "swap_space": 0.01,
        "tensor_parallel_size": tp,
        "pipeline_parallel_size": pp,
    }
    return EngineConfig(**defaults | settings)


def starter_of(config: EngineConfig) -> ChildStarter:
    """Return what starts children of this process."""
    return ChildStarter(COMMAND, ENVIRONMENT, config.num_ranks, 0)


def open_ranks(path: Path, tp: int, pp: int, **settings: Any) -> DistributedExecutor:
    """Open a tiny model over several ranks, on poisoned memory and with checks of what moves."""
    config = config_of(path, tp, pp, **settings)
    return DistributedExecutor(
        config,
        path,
        starter_of(config),
        eos_token_ids=frozenset({EOS_TOKEN_ID}),
        on_progress=lambda stage, fraction: None,
        is_poisoned=True,
        is_checked=True,
    )


def open_local(path: Path, **settings: Any) -> LocalExecutor:
    """Open the same model in this process."""
    return LocalExecutor(
        config_of(path, **settings),
        path,
        num_threads=1,
        eos_token_ids=frozenset({EOS_TOKEN_ID}),
        on_progress=lambda stage, fraction: None,
        is_poisoned=True,
    )


def arrivals(num_requests: int = 9) -> list[Arrival]:
    """Return requests of several lengths, some with a common beginning."""
    rng = random.Random(11)
    shared = [rng.randrange(2, VOCAB_SIZE) for _ in range(12)]
    found = []
    for index in range(num_requests):
        own = [rng.randrange(2, VOCAB_SIZE) for _ in range(rng.randrange(1, 40))]
        params = SamplingParams(
            temperature=0.0,
            seed=index,
            max_tokens=rng.randrange(12, 28),
            ignore_eos=True,
            logprobs=3,
            prompt_logprobs=2 if index % 4 == 1 else None,
            repetition_penalty=1.3 if index % 3 == 2 else 1.0,
        )
        found.append(Arrival((shared if index % 3 == 0 else []) + own, params))
    return found


class Watcher:
    """Fits `Observer`: how many steps were in flight at once."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.max_in_flight = 0

    def planned(self, plan: SchedulerOutput | None, can_compute: bool, now: float) -> None:
        """Look, once a plan is made."""
        assert self.engine is not None
        in_flight = self.engine.scheduler.num_steps_in_flight
        self.max_in_flight = max(self.max_in_flight, in_flight)

    def told(self, fact: object, now: float) -> None:
        """See nothing."""

    def updated(self, output: object, updates: Sequence[RequestUpdate], now: float) -> None:
        """See nothing."""


@dataclasses.dataclass
class Run:
    """What requests came to: their samples, the scores of their prompts, and what happened."""

    samples: list[list[Sample]]
    prompt_scores: list[list[float]]
    stats: SchedulerStats
    max_in_flight: int

    @property
    def tokens(self) -> list[list[int]]:
        """The ids of each request."""
        return [[sample.token_id for sample in one] for one in self.samples]

    @property
    def logprobs(self) -> list[list[float]]:
        """Every log probability that was told of each request."""
        return [
            [*scores, *(p for s in one if s.logprobs for p in (s.logprobs.logprob, *s.logprobs[3]))]
            for one, scores in zip(self.samples, self.prompt_scores, strict=True)
        ]


def run(
    executor: LocalExecutor | DistributedExecutor,
    requests: Sequence[Arrival],
    *,
    num_device_blocks: int = NUM_DEVICE_BLOCKS,
    **settings: Any,
) -> Run:
    """Take requests to their ends under a strict scheduler of its own."""
    defaults: dict[str, Any] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": WINDOW,
        "block_size": BLOCK_SIZE,
        "scheduling_policy": "skip-join-mlfq",
        "mlfq_quantum": 2e-3,
        "starvation_limit": 0.03,
        "preemption_mode": "recompute",
        "max_recompute_share": float("inf"),
        "num_slots": executor.num_slots,
        "lookahead": executor.lookahead,
        "eos_token_ids": frozenset({EOS_TOKEN_ID}),
        "is_strict": True,
    }
    config = SchedulerConfig(**defaults | settings)
    swaps = config.preemption_mode != "recompute"
    scheduler = build_scheduler(config, COSTS, num_device_blocks, NUM_HOST_BLOCKS if swaps else 0)
    watcher = Watcher()
    engine = Engine(scheduler, executor, MonotonicClock(), (watcher,))
    watcher.engine = engine
    numbers: dict[Handle, int] = {
        engine.add(arrival): index for index, arrival in enumerate(requests)
    }
    samples: list[list[Sample]] = [[] for _ in requests]
    scores: list[list[float]] = [[] for _ in requests]
    while not engine.is_idle:
        for update in engine.step():
            samples[numbers[update.handle]] += update.samples
            scores[numbers[update.handle]] += [s.logprob for s in update.prompt_logprobs]
            assert update.error is None
        scheduler.check()
    return Run(samples, scores, engine.stats().scheduler, watcher.max_in_flight)
