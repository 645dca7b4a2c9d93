"""What shapes the schedule, resolved from the engine's settings and what was measured.

Rules: frozen, resolved once: the limits of a step before the KV pool is sized, which may depend on
them, the rest after it. A default stands in `EngineConfig` and is taken from there.
Must not know: torch, the model's files, the machine.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError

_DEFAULTS: dict[str, Any] = {spec.name: spec.default for spec in dataclasses.fields(EngineConfig)}


class StepLimits(NamedTuple):
    """Most sequences and most tokens of one step."""

    max_num_seqs: int
    max_num_batched_tokens: int

    @classmethod
    def resolve(cls, config: EngineConfig, max_model_len: int, *, is_cpu: bool) -> StepLimits:
        """Fill the defaults that depend on the device and on the window.

        Raises ConfigError where prompts are not split and one that fills the window fits no step.
        """
        max_num_seqs = config.max_num_seqs or min(
            64 if is_cpu else 256, config.max_num_batched_tokens or 2**30
        )
        tokens = config.max_num_batched_tokens or max(512 if is_cpu else 2048, max_num_seqs)
        if not config.enable_chunked_prefill and config.max_num_batched_tokens is None:
            tokens = max(tokens, max_model_len)
        if not config.enable_chunked_prefill and tokens < max_model_len:
            raise ConfigError(
                f"--max-num-batched-tokens: {tokens} is below the window of {max_model_len} "
                "tokens, and without chunked prefill a prompt runs in one step"
            )
        return cls(max_num_seqs, tokens)


def pool_window(max_model_len: int, num_device_blocks: int, block_size: int) -> int:
    """Return the most tokens of one request: a window of the model, bounded by the KV pool."""
    return min(max_model_len, num_device_blocks * block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What the core needs, with every default resolved; lengths in tokens, times in seconds.

    `max_model_len` is the `pool_window`. `num_slots` steps of disjoint requests may be in flight
    (pipeline stages), and `lookahead` further ones of a request behind its unfinished one: the
    executor is built first, and these are its own.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int = _DEFAULTS["block_size"]
    max_live_seqs: int | None = _DEFAULTS["max_live_seqs"]
    enable_chunked_prefill: bool = _DEFAULTS["enable_chunked_prefill"]
    enable_prefix_caching: bool = _DEFAULTS["enable_prefix_caching"]
    scheduling_policy: str = _DEFAULTS["scheduling_policy"]
    latency_objective: float = _DEFAULTS["latency_objective"]
    boost: float = _DEFAULTS["boost"]
    max_pause: float = _DEFAULTS["max_pause"]
    fairness: bool = _DEFAULTS["fairness"]
    starvation_limit: float = _DEFAULTS["starvation_limit"]
    mlfq_quantum: float | None = _DEFAULTS["mlfq_quantum"]
    mlfq_quantum_ratio: float = _DEFAULTS["mlfq_quantum_ratio"]
    priority_aging: float = _DEFAULTS["priority_aging"]
    priority_quantum: float = _DEFAULTS["priority_quantum"]
    preemption_mode: str = _DEFAULTS["preemption_mode"]
    write_through: bool | None = _DEFAULTS["write_through"]
    max_recompute_share: float = _DEFAULTS["max_recompute_share"]
    num_slots: int = 1
    lookahead: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    is_strict: bool = False  # no progress, or an observer that fails, raises

    @classmethod
    def resolve(
        cls,
        config: EngineConfig,
        limits: StepLimits,
        *,
        max_model_len: int,
        num_slots: int,
        lookahead: int,
        eos_token_ids: frozenset[int],
        is_strict: bool = False,
    ) -> SchedulerConfig:
        """Return what `config` says, within limits; the rest are facts of model and machine."""
        own = {spec.name for spec in dataclasses.fields(cls)}
        shared = {name: getattr(config, name) for name in _DEFAULTS if name in own}
        return cls(
            **shared
            | limits._asdict()
            | {
                "max_model_len": max_model_len,
                "num_slots": num_slots,
                "lookahead": lookahead,
                "eos_token_ids": eos_token_ids,
                "is_strict": is_strict,
            }
        )
