"""Projections whose weights are int8, with a float32 scale for each output channel.

Rules: of a weight [out, in] a row's scale is its largest magnitude over 127, and its numbers are
rounded to the nearest whole multiples of it. Only weights are quantized: numbers of eight bits are
exact in bfloat16, so that the kernel multiplies and adds up as it does bfloat16 weights, and scales
the sum. Quantized piece by piece, so that loading needs little memory beside the weight.
Must not know: networks, batches, checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve.model.kernels.cpu.kernels import CpuKernels
from fastserve.model.kernels.cpu.panels import Panels, pack_panels
from fastserve.model.ops.panel_linear import PanelLinear
from fastserve.settings.option import ConfigError

LARGEST = 127
PIECE_ELEMENTS = 2**22
"""Elements that are widened to float32 at a time."""


def has_int8_linear(kernels: CpuKernels, weight: Tensor) -> bool:
    """Whether `weight` is to be quantized; a router's, which computes in float32, is not."""
    return weight.dtype is kernels.dtype


def int8_linear(kernels: CpuKernels, weight: Tensor, bias: Tensor | None = None) -> PanelLinear:
    """Return the projection of `weight` [out, in], quantized; nothing of it is kept.

    Raises ConfigError where an instruction's products do not divide the inputs.
    """
    if weight.shape[1] % kernels.per_lane:
        raise ConfigError(
            f"--quantization int8: a weight, or one shard of it, has {weight.shape[1]} inputs, and "
            "an odd number cannot be quantized"
        )
    width, depth = weight.shape
    numbers, scales = quantize(weight)
    tensor = kernels.weights.keep(pack_panels(numbers, kernels.per_lane))
    stride = tensor[0].numel()
    return PanelLinear(
        kernels, Panels(tensor, tensor.data_ptr(), bias, width, depth, stride, scales)
    )


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 numbers [out, in] and float32 scales [out], whose product is near `weight`.

    A row of zeros has the scale 0. One with a number that is not finite has such a scale.
    """
    numbers = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), dtype=torch.float32)
    height = max(PIECE_ELEMENTS // weight.shape[1], 1)
    for first in range(0, len(weight), height):
        rows = weight[first : first + height].to(torch.float32, copy=True)
        scale = rows.abs().amax(1) / LARGEST
        divisor = torch.where(scale > 0, scale, 1.0).unsqueeze(1)
        whole = rows.div_(divisor).round_().clamp_(-LARGEST, LARGEST)
        numbers[first : first + height] = whole.nan_to_num_(0.0)
        scales[first : first + height] = scale
    return numbers, scales
