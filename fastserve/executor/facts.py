"""What is found out about a model and its machine before it serves.

Rules: values that a message can carry; none is written back to the configuration.
Must not know: weights, KV, plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fastserve.checkpoint.model_config import ModelConfig
from fastserve.settings.engine import EngineConfig
from fastserve.settings.scheduler import StepLimits


class BlockCounts(NamedTuple):
    """KV blocks of each tier."""

    device: int
    host: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """What one rank knows once its weights are loaded."""

    block_bytes: int  # of a KV block: this rank's layers and KV heads
    cpu_kernels: str
    num_threads: int  # of one CPU operation


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorFacts:
    """What all ranks of an executor have in common, as agreed."""

    max_model_len: int
    limits: StepLimits
    vocab_size: int
    num_device_blocks: int
    num_host_blocks: int
    block_bytes: int  # of a KV block, on all ranks together
    dtype: str
    device: str
    cpu_kernels: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What step times depend on."""

    config: EngineConfig
    model_config: ModelConfig
    facts: ExecutorFacts
    num_threads: int
