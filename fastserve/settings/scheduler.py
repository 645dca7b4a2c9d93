"""What shapes the schedule, resolved from the engine's settings and what was measured.

Rules: frozen, resolved once. Must not know: torch, the model's files, the machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What the core needs, with every default resolved; lengths in tokens, times in seconds."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int = 16
    max_live_seqs: int | None = None
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    scheduling_policy: str = "skip-join-mlfq"
    starvation_limit: float = 0.3
    mlfq_quantum: float | None = None
    mlfq_quantum_ratio: float = 2.0
    priority_aging: float = 10.0
    preemption_mode: str = "recompute"
    max_recompute_share: float = 0.1
    num_slots: int = 1
    lookahead: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    cache_salt: str = ""
    is_strict: bool = False  # no progress raises, with the story of every request

    @classmethod
    def resolve(
        cls,
        config: EngineConfig,
        *,
        max_model_len: int,
        is_cpu: bool,
        num_slots: int,
        lookahead: int,
        eos_token_ids: frozenset[int],
    ) -> SchedulerConfig:
        """Fill the defaults that depend on the device and on the model's window."""
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
        return cls(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=tokens,
            max_model_len=max_model_len,
            block_size=config.block_size,
            max_live_seqs=config.max_live_seqs,
            enable_chunked_prefill=config.enable_chunked_prefill,
            enable_prefix_caching=config.enable_prefix_caching,
            scheduling_policy=config.scheduling_policy,
            starvation_limit=config.starvation_limit,
            mlfq_quantum=config.mlfq_quantum,
            mlfq_quantum_ratio=config.mlfq_quantum_ratio,
            priority_aging=config.priority_aging,
            preemption_mode=config.preemption_mode,
            max_recompute_share=config.max_recompute_share,
            num_slots=num_slots,
            lookahead=lookahead,
            eos_token_ids=eos_token_ids,
        )
