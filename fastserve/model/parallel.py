"""Tensor parallelism: the ranks that compute one network together, and what each has of it.

Rules: what is divided is divided here, and nowhere else. Heads evenly; where there are fewer
key-value heads than ranks, neighbours have the same one. Columns of an MLP as evenly as they can
be. Rows of a vocabulary in parts of one height, the last of which may reach beyond its end, so that
logits lie side by side. All else (norms, positions, routers) every rank has whole, and computes
from hidden state that has the same bits on all of them.
Imports no torch, so that a division can be judged before any rank is started.
Must not know: checkpoints, processes, how tensors travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fastserve.checkpoint.config_fields import ModelConfig
from fastserve.checkpoint.config_llama import LlamaConfig
from fastserve.settings.option import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class TensorGroup(Protocol):
    """The ranks of one stage; every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """The place of this rank, from 0."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Replace `x`, which may have no rows, by the sum of all ranks' and return it.

        The same bits on every rank. Where bits must not depend on the batch (`--deterministic`),
        the order of a sum must not depend on the shape of `x` or on the place of an element in it.
        """

    def gather(self, x: Tensor) -> Tensor | None:
        """Return all ranks' [n, w] side by side, [n, size * w], on rank 0; None elsewhere."""


class Alone:
    """Fits `TensorGroup`: one rank, which has everything."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor | None:
        return x


ALONE: TensorGroup = Alone()


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `size`, and which part it has of what is divided."""

    rank: int
    size: int

    @classmethod
    def of(cls, group: TensorGroup) -> Shard:
        """Return the shard of this rank."""
        return cls(group.rank, group.size)

    def heads(self, config: ModelConfig) -> range:
        """Return the query heads; `Parts.check` tells whether there are such."""
        count = config.num_heads // self.size
        return range(self.rank * count, (self.rank + 1) * count)

    def kv_heads(self, config: ModelConfig) -> range:
        """Return the key-value heads that these query heads attend to."""
        first = self.rank * config.num_kv_heads // self.size
        return range(first, first + max(config.num_kv_heads // self.size, 1))

    def columns(self, width: int) -> range:
        """Return the inner columns of an MLP; widths of two ranks differ by one at most."""
        return range(self.rank * width // self.size, (self.rank + 1) * width // self.size)

    def vocabulary(self, vocab_size: int) -> range:
        """Return the rows of a vocabulary, of `vocabulary_height` or fewer; the last have none."""
        height = self.vocabulary_height(vocab_size)
        first = min(self.rank * height, vocab_size)
        return range(first, min(first + height, vocab_size))

    def vocabulary_height(self, vocab_size: int) -> int:
        """Return the rows of every part, those that only fill it up included."""
        return -(-vocab_size // self.size)


class Parts(NamedTuple):
    """What of a network is counted where it is divided among ranks."""

    num_heads: int
    num_kv_heads: int
    num_columns: int  # of the narrowest MLP

    @classmethod
    def of(cls, config: ModelConfig) -> Parts:
        """Return those of a network."""
        return cls(config.num_heads, config.num_kv_heads, _narrowest(config))

    def check(self, tensor_parallel_size: int) -> None:
        """Raise ConfigError where they cannot be divided among so many ranks."""
        if self.can_divide(tensor_parallel_size):
            return
        possible = [size for size in range(1, self.num_heads + 1) if self.can_divide(size)]
        if self._can_divide_heads(tensor_parallel_size):
            what = f"{self.num_columns} columns of an MLP"
        elif self.num_kv_heads < self.num_heads:
            what = f"{self.num_heads} attention heads and {self.num_kv_heads} key-value heads"
        else:
            what = f"{self.num_heads} attention heads"
        raise ConfigError(
            f"--tensor-parallel-size {tensor_parallel_size}: the model's {what} cannot be divided "
            f"so (possible: {', '.join(map(str, possible))})"
        )

    def can_divide(self, size: int) -> bool:
        """Whether each of `size` ranks gets as many heads, and some of every MLP."""
        return self._can_divide_heads(size) and self.num_columns >= size

    def _can_divide_heads(self, size: int) -> bool:
        """Whether ranks get as many query heads: whole groups of them, or parts of one group."""
        if size < 1 or self.num_heads % size:
            return False
        return self.num_kv_heads % size == 0 or size % self.num_kv_heads == 0


def _narrowest(config: ModelConfig) -> int:
    """Return the columns of the narrowest MLP."""
    experts = config.experts if isinstance(config, LlamaConfig) else None
    if experts is None:
        return config.intermediate_size
    if len(experts.sparse_layers) == config.num_layers:
        return experts.intermediate_size
    return min(config.intermediate_size, experts.intermediate_size)
