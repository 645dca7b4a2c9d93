"""CostModel: the one place that says how long prefill, decode and copies take.

Skip-join, ENST, billing and the simulator all ask here. Coefficients come from a profile of the
actual model on the actual device (executor/profiler.py). Must not know: how they were measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds of one step, linear in what it computes.

    step = base + prefill_token · Σ tokens + prefill_pair · Σ tokens · (start + tokens / 2)
                + decode_seq · decodes + decode_context · Σ context
    where a share of one token is a decode and `context` counts the tokens it attends to.
    """

    base_s: float
    prefill_token_s: float
    prefill_pair_s: float = 0.0
    decode_seq_s: float = 0.0
    decode_context_s: float = 0.0
    copy_base_s: float = 0.0
    copy_block_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a model under which work is free: no quantum could be derived from it."""
        if self.min_iteration_s <= 0.0:
            raise ValueError(f"the minimum iteration time must be positive: {self}")

    @property
    def min_iteration_s(self) -> float:
        """Seconds of the shortest step there is: one decode with one token of context."""
        return self.base_s + self.decode_seq_s + self.decode_context_s

    def marginal_s(self, num_tokens: int, start: int) -> float:
        """Return the seconds that a share adds to a step: positions [start, start + num_tokens)."""
        if num_tokens == 1:
            return self.decode_seq_s + self.decode_context_s * (start + 1)
        return num_tokens * (self.prefill_token_s + self.prefill_pair_s * (start + num_tokens / 2))

    def iteration_s(self, num_tokens: int, start: int) -> float:
        """Return the seconds of a step with this one share."""
        return self.base_s + self.marginal_s(num_tokens, start)

    def prefill_s(self, num_tokens: int, start: int, max_chunk: int) -> float:
        """Return the seconds to prefill [start, start + num_tokens) in chunks, alone."""
        num_chunks = -(-num_tokens // max_chunk)
        return num_chunks * self.base_s + self.marginal_s(num_tokens, start)

    def step_s(self, shares: Iterable[tuple[int, int]]) -> float:
        """Return the seconds of a step; a share is (num_tokens, start)."""
        return self.base_s + sum(self.marginal_s(tokens, start) for tokens, start in shares)

    def copy_s(self, num_blocks: int) -> float:
        """Return the seconds to move blocks between the tiers."""
        return self.copy_base_s + self.copy_block_s * num_blocks
