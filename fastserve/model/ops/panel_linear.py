"""PanelLinear: a projection by our own kernel, and by oneDNN's where that is the faster one.

Rules: the weight is held once. oneDNN lays bfloat16 weights out as our panels are wherever it has
been looked at, and whether it has done so is looked at for each weight; one that it has not is
oneDNN's alone (PackedLinear).
Must not know: networks, batches.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from fastserve.model.kernels.cpu import onednn
from fastserve.model.kernels.cpu.kernels import CpuKernels
from fastserve.model.kernels.cpu.panels import WIDTH, Panels, pack_panels
from fastserve.model.ops.interfaces import LinearOp
from fastserve.model.ops.packed_linear import PackedLinear


class PanelLinear:
    """y = x Wᵀ + b. Fits `LinearOp`."""

    __slots__ = ("is_rowwise", "kernels", "max_rows", "out_width", "packed", "panels")

    def __init__(
        self,
        kernels: CpuKernels,
        panels: Panels,
        packed: PackedLinear | None = None,
        max_rows: float = math.inf,
    ) -> None:
        """Take a weight in panels, and the same as oneDNN has it for more than `max_rows` rows."""
        self.kernels = kernels
        self.panels = panels
        self.packed = packed
        self.max_rows = max_rows
        self.out_width = panels.width
        self.is_rowwise = packed is None and kernels.is_rowwise

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is not None and len(x) > self.max_rows:
            return self.packed(x)
        return self.kernels.project(x.contiguous(), self.panels)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        if self.packed is not None and len(x) > self.max_rows:
            return self.packed.add_to(residual, x)
        return self.kernels.project(x.contiguous(), self.panels, residual)


def panel_linear(kernels: CpuKernels, weight: Tensor, bias: Tensor | None = None) -> PanelLinear:
    """Return the projection of a weight that is held in panels only."""
    width, depth = weight.shape
    tensor = kernels.weights.keep(pack_panels(weight, kernels.per_lane))
    panels = Panels(tensor, tensor.data_ptr(), bias, width, depth, tensor[0].numel())
    return PanelLinear(kernels, panels)


def make_linear(kernels: CpuKernels, weight: Tensor, bias: Tensor | None) -> LinearOp | None:
    """Return a projection that runs in our own kernel where that pays; None: nowhere."""
    max_rows = kernels.max_rows
    has_kernel = weight.dtype is kernels.dtype and weight.shape[1] % kernels.per_lane == 0
    if max_rows == 0 or not has_kernel or min(weight.shape) < onednn.MIN_WIDTH:
        return None
    if max_rows == math.inf:
        return panel_linear(kernels, weight, bias)
    if not onednn.can_pack(weight):
        return None
    packed = PackedLinear(weight, bias)
    shared = find_panels(packed, weight, kernels.per_lane)
    return packed if shared is None else PanelLinear(kernels, shared, packed, max_rows)


def find_panels(packed: PackedLinear, weight: Tensor, per_lane: int) -> Panels | None:
    """Return the panels that oneDNN has laid `weight` out in; None where it is another layout."""
    width, depth = weight.shape
    num_panels = -(-width // WIDTH)
    num_elements = onednn.num_bytes(packed.packed) // weight.itemsize
    padded_depth, rest = divmod(num_elements, num_panels * WIDTH)
    if rest or padded_depth < depth or padded_depth % per_lane:
        return None
    address = onednn.address(packed.packed)
    expected = pack_panels(weight, per_lane, padded_depth).view(torch.uint8).flatten()
    found = (ctypes.c_uint8 * len(expected)).from_address(address)
    if not torch.equal(torch.frombuffer(found, dtype=torch.uint8), expected):
        return None
    stride = padded_depth * WIDTH
    return Panels(packed.packed, address, packed.bias, width, depth, stride)
