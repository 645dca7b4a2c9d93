"""RowParallelLinear: a projection whose inputs are divided among ranks.

Must not know: architectures, checkpoints, batches, how tensors travel.
"""

from __future__ import annotations

from torch import Tensor

from fastserve.model.ops.interfaces import LinearOp
from fastserve.model.parallel import TensorGroup


class RowParallelLinear:
    """y = Σ over ranks x_r W_rᵀ, plus b, which is one rank's alone. Fits `LinearOp`."""

    is_rowwise = False
    __slots__ = ("group", "out_width", "partial")

    def __init__(self, partial: LinearOp, group: TensorGroup) -> None:
        """Take this rank's term of the sum."""
        self.partial = partial
        self.out_width = partial.out_width
        self.group = group

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(self.partial(x))

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Fit `LinearOp`: the residual, which all ranks have, is added to the sum once."""
        return residual.add_(self(x))
