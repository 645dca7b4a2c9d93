"""Puts a scheduler together from settings, costs and measured sizes."""

from __future__ import annotations

from collections.abc import Mapping

from fastserve.config import SchedulerConfig
from fastserve.core.block import BlockPool
from fastserve.core.cost_model import CostModel
from fastserve.core.journal import Journal, JournaledScheduler
from fastserve.core.kv_cache import KVCacheManager
from fastserve.core.policies.fcfs import FCFS
from fastserve.core.policies.mlfq import MLFQ
from fastserve.core.policies.priority_classes import PriorityClasses
from fastserve.core.policies.protocol import Policy
from fastserve.core.policies.srpt import SRPT
from fastserve.core.scheduler import Scheduler


def build_policy(
    config: SchedulerConfig, cost_model: CostModel, lengths: Mapping[int, int] | None = None
) -> Policy:
    """Return a fresh policy of the configured name.

    `lengths` (handle → output tokens) is the foresight that `srpt` needs. Raises ValueError for an
    unknown name, or for `srpt` without lengths.
    """
    match config.scheduling_policy:
        case "fcfs":
            return FCFS()
        case "mlfq" | "skip-join-mlfq":
            return MLFQ(
                cost_model,
                quantum_s=config.mlfq_quantum or cost_model.min_iteration_s,
                quantum_ratio=config.mlfq_quantum_ratio,
                starvation_limit=config.starvation_limit,
                max_num_seqs=config.max_num_seqs,
                max_chunk=(
                    config.max_num_batched_tokens
                    if config.enable_chunked_prefill
                    else config.max_model_len
                ),
                skip_join=config.scheduling_policy == "skip-join-mlfq",
            )
        case "srpt" if lengths is not None:
            return SRPT(cost_model, lengths)
    raise ValueError(f"no scheduling policy {config.scheduling_policy!r} can be built here")


def build_scheduler(
    config: SchedulerConfig,
    cost_model: CostModel,
    num_device_blocks: int,
    num_host_blocks: int = 0,
    *,
    lengths: Mapping[int, int] | None = None,
    journal: Journal | None = None,
) -> Scheduler:
    """Return a scheduler over empty pools."""
    cache = KVCacheManager(
        BlockPool(num_device_blocks, num_host_blocks),
        config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
        salt=config.cache_salt.encode(),
    )
    policy = PriorityClasses(
        lambda: build_policy(config, cost_model, lengths), config.priority_aging
    )
    if journal is None:
        return Scheduler(config, policy, cache)
    return JournaledScheduler(config, policy, cache, journal=journal)
