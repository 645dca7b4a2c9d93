"""Puts a scheduler together from settings, costs and measured sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from fastserve.core.cost_model import CostModel
from fastserve.core.lengths import LengthModel
from fastserve.core.memory.block import BlockPool
from fastserve.core.memory.eviction import Defer, Eviction, Recompute, RecomputeBudget
from fastserve.core.memory.memory import KVCacheManager
from fastserve.core.memory.victims import VictimRanking
from fastserve.core.outlook import Outlook
from fastserve.core.policies.artifact_mlfq import (
    QUANTUM_RATIO,
    QUANTUM_S,
    STARVATION_LIMIT,
    ArtifactMLFQ,
)
from fastserve.core.policies.fcfs import FCFS
from fastserve.core.policies.fixed_priority import FixedPriority
from fastserve.core.policies.hrrn import HighestRatioNext
from fastserve.core.policies.learned import Learned
from fastserve.core.policies.mlfq import MLFQ
from fastserve.core.policies.priority_classes import PriorityClasses
from fastserve.core.policies.protocol import ClassPolicy, Policy
from fastserve.core.policies.quanta import Quanta, one_level, skip_levels
from fastserve.core.policies.reservation import WHOLE_IN_ORDER
from fastserve.core.policies.run_to_completion import RunToCompletion
from fastserve.core.policies.sjf import MeanAnswer, ShortestJobFirst
from fastserve.core.policies.srpt import SRPT
from fastserve.core.policies.static import Static
from fastserve.core.scheduler import Scheduler
from fastserve.settings.scheduler import SchedulerConfig

NUM_BOUNDLESS_BLOCKS = 2**40


def build_policy(
    config: SchedulerConfig,
    cost_model: CostModel,
    num_device_blocks: int = NUM_BOUNDLESS_BLOCKS,
    lengths: Mapping[int, int] | None = None,
) -> ClassPolicy:
    """Return a fresh policy of the configured name, for one priority class on its own.

    Raises ValueError as `policy_factory`.
    """
    return policy_factory(config, cost_model, num_device_blocks, lengths)()


def policy_factory(
    config: SchedulerConfig,
    cost_model: CostModel,
    num_device_blocks: int,
    lengths: Mapping[int, int] | None = None,
    length_model: LengthModel | None = None,
) -> Callable[[], ClassPolicy]:
    """Return what makes a policy of the configured name for each priority class.

    What the classes learn together is made here, once. `lengths` (handle → output tokens) is the
    foresight that `srpt` needs, `length_model` what `learned` begins with: nothing by default.
    Raises ValueError for an unknown name, or for `srpt` without lengths.
    """
    match config.scheduling_policy:
        case "fcfs":
            return FCFS
        case "orca":
            return partial(FCFS, WHOLE_IN_ORDER)
        case "static":
            return partial(Static, config.max_num_seqs)
        case "fixed-priority":
            return FixedPriority
        case "hrrn":
            chunk = max_chunk(config)
            return lambda: RunToCompletion(HighestRatioNext(cost_model, chunk))
        case "sjf":
            chunk, mean = max_chunk(config), MeanAnswer()
            return lambda: RunToCompletion(ShortestJobFirst(cost_model, chunk, mean))
        case "mlfq":
            return partial(build_mlfq, config, cost_model, skip_join=False)
        case "skip-join-mlfq":
            return partial(build_mlfq, config, cost_model, skip_join=True)
        case "artifact-mlfq":
            settings = replace(
                config,
                mlfq_quantum=QUANTUM_S,
                mlfq_quantum_ratio=QUANTUM_RATIO,
                starvation_limit=STARVATION_LIMIT,
            )
            return lambda: ArtifactMLFQ(
                build_mlfq(settings, cost_model, skip_join=True, level_below=one_level)
            )
        case "learned":
            outlook = Outlook(length_model or LengthModel(), config.latency_objective)
            return partial(
                Learned,
                cost_model,
                outlook,
                boost=config.boost,
                max_pause_s=config.max_pause,
                max_num_seqs=config.max_num_seqs,
                window=config.max_model_len,
                block_size=config.block_size,
                num_kv_tokens=num_device_blocks * config.block_size,
            )
        case "srpt" if lengths is not None:
            return partial(SRPT, cost_model, lengths)
    raise ValueError(f"no scheduling policy {config.scheduling_policy!r} can be built here")


def build_mlfq(
    config: SchedulerConfig,
    cost_model: CostModel,
    *,
    skip_join: bool,
    level_below: Callable[[Quanta, int, float], int] = skip_levels,
) -> MLFQ:
    """Return an MLFQ whose q₁ is the minimum iteration time unless one is configured."""
    return MLFQ(
        cost_model,
        quantum_s=config.mlfq_quantum or cost_model.min_iteration_s,
        quantum_ratio=config.mlfq_quantum_ratio,
        starvation_limit=config.starvation_limit,
        max_num_seqs=config.max_num_seqs,
        max_chunk=max_chunk(config),
        skip_join=skip_join,
        level_below=level_below,
    )


def build_scheduler(
    config: SchedulerConfig,
    cost_model: CostModel,
    num_device_blocks: int,
    num_host_blocks: int = 0,
    *,
    policy: Policy | None = None,
    lengths: Mapping[int, int] | None = None,
    length_model: LengthModel | None = None,
) -> Scheduler:
    """Return a scheduler over empty pools. Raises ValueError where one request might not fit.

    A `policy` orders in place of priority classes of the configured one; that is handed the rest.
    """
    if config.max_model_len > num_device_blocks * config.block_size:
        raise ValueError(
            f"{num_device_blocks} blocks of {config.block_size} tokens do not hold the window of "
            f"{config.max_model_len}"
        )
    if policy is None:
        make_policy = policy_factory(config, cost_model, num_device_blocks, lengths, length_model)
        policy = PriorityClasses(make_policy, config.priority_aging)
    is_ideal = config.preemption_mode == "ideal"
    cache = KVCacheManager(
        BlockPool(NUM_BOUNDLESS_BLOCKS if is_ideal else num_device_blocks),
        config.block_size,
        VictimRanking(policy),
        build_eviction(config, cost_model),
        max_tables=config.max_live_seqs,
        num_resident_blocks=num_device_blocks if is_ideal else None,
        enable_prefix_caching=config.enable_prefix_caching,
    )
    return Scheduler(config, policy, cache)


def build_eviction(config: SchedulerConfig, cost_model: CostModel) -> Eviction:
    """Return what the configured mode lets requests take; `ideal` bounds no recomputation."""
    if config.preemption_mode == "defer":
        return Defer()
    is_ideal = config.preemption_mode == "ideal"
    budget = RecomputeBudget(
        cost_model,
        share=float("inf") if is_ideal else config.max_recompute_share,
        max_chunk=max_chunk(config),
        window=config.max_model_len,
    )
    return Recompute(budget)


def max_chunk(config: SchedulerConfig) -> int:
    """Return the longest prefill share of one step, in tokens."""
    if config.enable_chunked_prefill:
        return config.max_num_batched_tokens
    return config.max_model_len
