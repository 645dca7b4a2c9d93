"""Layout: which rank computes which stage of the layers, and which shard of it.

Rules: shards of one stage are neighbours, rank = stage · tp + shard, so that those that exchange
most are started side by side. Shard 0 leads its stage: it says how long the stage took, and in the
last stage it draws the samples. Must not know: how ranks are started, layers, tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.settings.engine import EngineConfig


@dataclass(frozen=True, slots=True)
class Layout:
    """A grid of `pipeline_parallel_size` stages of `tensor_parallel_size` shards each."""

    tensor_parallel_size: int
    pipeline_parallel_size: int

    @classmethod
    def of(cls, config: EngineConfig) -> Layout:
        """Return what the settings ask for."""
        return cls(config.tensor_parallel_size, config.pipeline_parallel_size)

    @property
    def num_ranks(self) -> int:
        """Ranks there are, from 0 on."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def rank_at(self, stage: int, shard: int) -> int:
        """Return the rank of a place in the grid."""
        return stage * self.tensor_parallel_size + shard

    def stage_of(self, rank: int) -> int:
        """Return the stage of a rank, from 0 on."""
        return rank // self.tensor_parallel_size

    def shard_of(self, rank: int) -> int:
        """Return the shard of a rank, from 0 on."""
        return rank % self.tensor_parallel_size

    def shards_of(self, stage: int) -> tuple[int, ...]:
        """Return the ranks of a stage."""
        return tuple(self.rank_at(stage, shard) for shard in range(self.tensor_parallel_size))

    def is_leader(self, rank: int) -> bool:
        """Whether a rank speaks for its stage."""
        return self.shard_of(rank) == 0

    def before(self, rank: int) -> int | None:
        """Return the rank that hands hidden state to this one; None in the first stage."""
        stage = self.stage_of(rank)
        return None if stage == 0 else rank - self.tensor_parallel_size

    def behind(self, rank: int) -> int | None:
        """Return the rank that this one hands hidden state to; None in the last stage."""
        following = rank + self.tensor_parallel_size
        return following if following < self.num_ranks else None

    def describe(self, rank: int) -> str:
        """Say where in the grid a rank is."""
        return (
            f"stage {self.stage_of(rank)} of {self.pipeline_parallel_size}, "
            f"shard {self.shard_of(rank)} of {self.tensor_parallel_size}"
        )
