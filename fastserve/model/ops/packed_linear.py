"""PackedLinear: a projection whose weight lies as oneDNN's kernels read it.

Rules: the packed weight replaces the plain one, so that a weight is held once; a caller that keeps
the plain one (an embedding tied to the head) pays for both. What may be packed is asked with
`can_pack`.
Must not know: networks, batches.
"""

from __future__ import annotations

from torch import Tensor

from fastserve.model.kernels.cpu import onednn


class PackedLinear:
    """y = x Wᵀ + b. Fits `LinearOp`."""

    is_rowwise = False
    __slots__ = ("bias", "out_width", "packed")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_width = weight.shape[0]
        self.packed = onednn.pack(weight)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return onednn.product(x, self.packed, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual.add_(onednn.product(x, self.packed, self.bias))
