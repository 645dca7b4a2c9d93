"""Puts a scheduler together from settings, costs and measured sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from fastserve.core.cost_model import CostModel
from fastserve.core.lengths import LengthModel
from fastserve.core.memory.eviction import Defer, Eviction, Recompute, RecomputeBudget, Swap
from fastserve.core.memory.link import Link
from fastserve.core.memory.memory import KVCacheManager
from fastserve.core.memory.pool import BlockPool
from fastserve.core.memory.swap import Swapper
from fastserve.core.memory.victims import VictimRanking
from fastserve.core.outlook import Outlook
from fastserve.core.policies.artifact_mlfq import (
    QUANTUM_RATIO,
    QUANTUM_S,
    STARVATION_LIMIT,
    ArtifactMLFQ,
)
from fastserve.core.policies.fair_tenants import FairTenants, ServiceCounters
from fastserve.core.policies.fcfs import FCFS
from fastserve.core.policies.fixed_priority import fixed_priority
from fastserve.core.policies.hrrn import HighestRatioNext
from fastserve.core.policies.learned import Learned
from fastserve.core.policies.mlfq import MLFQ
from fastserve.core.policies.priority_classes import PriorityClasses
from fastserve.core.policies.protocol import ClassPolicy, Coldness, Policy
from fastserve.core.policies.quanta import Quanta, one_level, skip_levels
from fastserve.core.policies.reservation import WHOLE_IN_ORDER
from fastserve.core.policies.run_to_completion import RunToCompletion
from fastserve.core.policies.sjf import MeanAnswer, ShortestJobFirst
from fastserve.core.policies.srpt import srpt
from fastserve.core.policies.static import Static
from fastserve.core.request import Request
from fastserve.core.scheduler import Scheduler
from fastserve.settings.scheduler import SchedulerConfig

NUM_BOUNDLESS_BLOCKS = 2**40
ONE_TIER_MODES = ("recompute", "defer")
SPARE_SHARE = 1 / 16  # of a `Reservation`, where KV that is taken has to be computed again


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
    num_host_blocks: int = 0,
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
            return fixed_priority
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
            return learned_factory(
                config, cost_model, num_device_blocks, length_model, num_host_blocks
            )
        case "srpt" if lengths is not None:
            return partial(srpt, cost_model, lengths)
    raise ValueError(f"no scheduling policy {config.scheduling_policy!r} can be built here")


def learned_factory(
    config: SchedulerConfig,
    cost_model: CostModel,
    num_device_blocks: int,
    length_model: LengthModel | None,
    num_host_blocks: int,
) -> Callable[[], ClassPolicy]:
    """Return what makes `learned` for each priority class, or for each tenant within it."""
    outlook = Outlook(length_model or LengthModel(), config.latency_objective)
    # Work is in seconds of the machine, of which each step in flight has its share.
    shared_costs = cost_model.shared_by(config.num_slots)
    make_learned = partial(
        Learned,
        shared_costs,
        outlook,
        boost=config.boost,
        max_pause_s=config.max_pause,
        max_num_seqs=config.max_num_seqs,
        window=config.max_model_len,
        block_size=config.block_size,
        num_kv_tokens=num_device_blocks * config.block_size // config.num_slots,
        spare_share=0.0 if has_host_tier(config, num_host_blocks) else SPARE_SHARE,
    )
    if not config.fairness:
        return make_learned
    counters = ServiceCounters(shared_costs, config.max_num_seqs)
    return partial(FairTenants, make_learned, counters, config.max_num_seqs * config.num_slots)


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
        make_policy = policy_factory(
            config, cost_model, num_device_blocks, lengths, length_model, num_host_blocks
        )
        policy = PriorityClasses(make_policy, config.priority_aging, config.priority_quantum)
    return Scheduler(
        config, policy, build_cache(config, cost_model, policy, num_device_blocks, num_host_blocks)
    )


def build_cache(
    config: SchedulerConfig,
    cost_model: CostModel,
    policy: Policy,
    num_device_blocks: int,
    num_host_blocks: int,
) -> KVCacheManager:
    """Return empty KV memory: of two tiers where the mode swaps and there is a host tier."""
    is_ideal = config.preemption_mode == "ideal"
    if is_ideal:
        num_host_blocks = NUM_BOUNDLESS_BLOCKS
        cost_model = replace(cost_model, copy_base_s=0.0, copy_block_s=0.0)
    eviction = build_eviction(config, cost_model)
    chunk, block_size = max_chunk(config), config.block_size
    swapper = None
    if has_host_tier(config, num_host_blocks):
        pool = BlockPool(num_device_blocks, num_host_blocks, saves_evicted=is_ideal)
        eviction = Swap(cost_model, block_size, eviction)
        swapper = build_swapper(config, cost_model, policy, pool)
    else:
        pool = BlockPool(num_device_blocks)

    def is_worth_loading(num_blocks: int) -> bool:
        prefill_s = cost_model.prefill_s(num_blocks * block_size, 0, chunk)
        return cost_model.copy_s(num_blocks) < prefill_s

    return KVCacheManager(
        pool,
        block_size,
        VictimRanking(policy),
        eviction,
        swapper=swapper,
        is_worth_loading=is_worth_loading,
        max_tables=config.max_live_seqs,
        enable_prefix_caching=config.enable_prefix_caching,
    )


def has_host_tier(config: SchedulerConfig, num_host_blocks: int) -> bool:
    """Return whether KV may go to a host; for `ideal` that is boundless."""
    if config.preemption_mode in ONE_TIER_MODES:
        return False
    return config.preemption_mode == "ideal" or num_host_blocks > 0


def build_swapper(
    config: SchedulerConfig, cost_model: CostModel, policy: Policy, pool: BlockPool
) -> Swapper:
    """Return what moves KV as the configured mode says."""
    mode = config.preemption_mode
    is_proactive = mode != "reactive"

    def by_level(request: Request, now: float) -> Coldness:
        level = 0 if policy.levels is None else policy.levels.level(request)
        return (level, request.last_ran_at)

    return Swapper(
        pool,
        Link(cost_model.copy_s),
        by_level if mode == "proactive-by-level" else policy.coldness,
        block_size=config.block_size,
        window_s=cost_model.min_iteration_s,
        saves_ahead=is_proactive if config.write_through is None else config.write_through,
        fetches_ahead=is_proactive,
    )


def build_eviction(config: SchedulerConfig, cost_model: CostModel) -> Eviction:
    """Return what becomes of KV that has no place on the host; `ideal` bounds no recomputation."""
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
