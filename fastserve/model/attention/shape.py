"""AttentionShape: what one attention computes, whichever kernels compute it.

Must not know: weights, batches, devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastserve.checkpoint.config_fields import ModelConfig
from fastserve.model.parallel import Shard


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """softmax(scale · q Kᵀ) V, with heads in groups that share a key-value head."""

    num_heads: int
    num_kv_heads: int  # divides num_heads
    head_dim: int
    scale: float

    @classmethod
    def scaled_by_dim(cls, num_heads: int, num_kv_heads: int, head_dim: int) -> AttentionShape:
        """Return a shape with the usual scale, 1 / √head_dim."""
        return cls(num_heads, num_kv_heads, head_dim, 1.0 / math.sqrt(head_dim))

    @classmethod
    def of(cls, config: ModelConfig, num_ranks: int = 1) -> AttentionShape:
        """Return what each of `num_ranks` computes in the layers of a network."""
        shard = Shard(0, num_ranks)  # all have as many heads
        return cls.scaled_by_dim(
            len(shard.heads(config)), len(shard.kv_heads(config)), config.head_dim
        )

    @property
    def group_size(self) -> int:
        """Query heads that share a key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def width(self) -> int:
        """Elements of a token's mixed values: all query heads side by side."""
        return self.num_heads * self.head_dim
