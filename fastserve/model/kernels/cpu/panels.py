"""Panels: how a weight lies in memory for the projections of projection.h.

Rules: 64 outputs side by side over the whole depth, as many inputs to a lane as one instruction
adds up: a panel is read from beginning to end. What is missing in the last panel is zero.
Must not know: networks, what else reads the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

WIDTH = 64
CHUNKS_PER_THREAD = 4
"""With fewer, the columns of a panel are shared out, for balance."""


@dataclass(frozen=True, slots=True)
class Panels:
    """A weight [width, depth] in panels."""

    tensor: Tensor  # holds the memory, whatever its kind
    address: int
    bias: Tensor | None  # [width]
    width: int
    depth: int
    stride: int  # elements of a panel
    scales: Tensor | None = None  # [width] float32, of a weight of int8; None: of their dtype

    def columns(self, threads: int) -> int:
        """Return how many columns a chunk is to have: 16, 32 or 64."""
        columns = WIDTH
        while columns > 16 and self.width < CHUNKS_PER_THREAD * threads * columns:
            columns //= 2
        return columns

    def values(self, threads: int) -> tuple[int, ...]:
        """Return what the struct `Panels` of layers.h holds."""
        bias = 0 if self.bias is None else self.bias.data_ptr()
        scales = 0 if self.scales is None else self.scales.data_ptr()
        columns = self.columns(threads)
        return self.address, bias, scales, self.depth, self.width, self.stride, columns


def pack_panels(weight: Tensor, per_lane: int, depth: int | None = None) -> Tensor:
    """Return `weight` [width, depth] as [panels, depth / per_lane, 64, per_lane].

    The depth must be a multiple of `per_lane`; a larger one than the weight's is filled with zeros.
    """
    width, own_depth = weight.shape
    padding = (0, (depth or own_depth) - own_depth, 0, -width % WIDTH)
    padded = F.pad(weight, padding) if any(padding) else weight
    panels = padded.view(-1, WIDTH, padded.shape[1] // per_lane, per_lane)
    return panels.transpose(1, 2).contiguous()
