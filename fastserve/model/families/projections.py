"""ProjectionReader: how families read their matrices: whole, or one rank's part of each.

Rules: a column-parallel matrix gives a rank some of its outputs, a row-parallel one takes some of
its inputs, and ranks add up what comes of it, the first one with the bias. Matrices are [out, in]
whichever way a checkpoint stores them. Of each, only this rank's part is read.
Must not know: families, attention, MLPs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastserve.model.loader import Slice, Weights
from fastserve.model.ops.interfaces import LinearOp, Ops
from fastserve.model.ops.parallel import RowParallelLinear
from fastserve.model.parallel import Shard, TensorGroup

Matrix = tuple[Tensor, Tensor | None]
"""A weight [out, in] and its bias [out]."""


class ProjectionReader:
    """Reads the matrices of one checkpoint for one rank of a group."""

    def __init__(
        self, weights: Weights, ops: Ops, group: TensorGroup, *, is_transposed: bool = False
    ) -> None:
        """`is_transposed` says that the checkpoint stores matrices as [in, out]."""
        self.weights = weights
        self.ops = ops
        self.group = group
        self.shard = Shard.of(group)
        self._is_transposed = is_transposed

    def column_parallel(
        self, name: str, out_width: int, in_width: int, part: range, *, has_bias: bool
    ) -> Matrix:
        """Return the rows of a weight [out, in], and of its bias, that make the outputs `part`."""
        weight = self.weight(name, out_width, in_width, Slice.of(part))
        if not has_bias:
            return weight, None
        return weight, self.weights.get(f"{name}.bias", out_width, part=Slice.of(part))

    def row_parallel(
        self, name: str, out_width: int, in_width: int, part: range, *, has_bias: bool
    ) -> LinearOp:
        """Make a projection of which this rank has the inputs `part`, and the sum has all."""
        weight = self.weight(name, out_width, in_width, Slice.of(part, dim=1))
        bias = self.weights.get(f"{name}.bias", out_width) if has_bias else None
        if self.group.size == 1:
            return self.ops.linear(weight, bias)
        return RowParallelLinear(
            self.ops.linear(weight, bias if self.group.rank == 0 else None), self.group
        )

    def vocabulary(self, name: str, vocab_size: int, width: int) -> Tensor:
        """Return this rank's rows of a table [vocab, width], filled up with zeros."""
        rows = self.shard.vocabulary(vocab_size)
        table = self.weights.get(name, vocab_size, width, part=Slice.of(rows))
        missing = self.shard.vocabulary_height(vocab_size) - len(rows)
        return F.pad(table, (0, 0, 0, missing)) if missing else table

    def weight(self, name: str, out_width: int, in_width: int, part: Slice) -> Tensor:
        """Return a part of a weight [out, in]."""
        if not self._is_transposed:
            return self.weights.get(f"{name}.weight", out_width, in_width, part=part)
        stored = Slice(part.start, part.stop, dim=1 - part.dim)
        weight = self.weights.get(f"{name}.weight", in_width, out_width, part=stored)
        return weight.t().contiguous()


def times(part: range, width: int) -> range:
    """Return the columns of `part`, each of whose items is `width` columns wide."""
    return range(part.start * width, part.stop * width)


def shifted(part: range, first: int) -> range:
    """Return the columns of `part` among those that begin with column `first`."""
    return range(first + part.start, first + part.stop)


def stack(matrices: Sequence[Matrix]) -> Matrix:
    """Return one matrix of several that take the same inputs; all have a bias, or none."""
    biases = [bias for _, bias in matrices if bias is not None]
    weight = torch.cat([weight for weight, _ in matrices])
    return weight, torch.cat(biases) if biases else None
