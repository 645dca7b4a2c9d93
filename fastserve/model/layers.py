"""The layers of the Llama family, as plain callables over tensors.

Rules: no per-request Python, no nn.Module (its call overhead is a visible share of a decode step of
a small model). Rotary pairs are interleaved in memory: the loader permutes the rows of the query
and key projections, so that rotation is one complex product. Scores do not change, since queries
and keys are permuted alike. Must not know: paging, batches, checkpoints.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastserve.model.config import RopeConfig


class Linear:
    """y = x Wᵀ + b."""

    __slots__ = ("bias", "transposed", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight  # [out, in]
        self.transposed = weight.t()
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """Project the rows of `x`."""
        return F.linear(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Add the projection to `residual` in place: the sum is part of the matrix product."""
        if self.bias is not None:
            residual.add_(self.bias)
        return residual.addmm_(x, self.transposed)


class RMSNorm:
    """x / rms(x) · weight over the last dimension."""

    __slots__ = ("eps", "eps_tensor", "shape", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.shape = (weight.shape[-1],)
        self.eps = eps
        self.eps_tensor = torch.full((1,), eps, dtype=weight.dtype, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalize; statistics are taken in float32 for half types."""
        if x.dtype != torch.float32:
            return F.rms_norm(x, self.shape, None, self.eps).mul_(self.weight)
        # The same in fewer operations than the built-in one is made of on a CPU.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self.eps_tensor, norm, norm, value=1.0 / self.shape[0]).rsqrt_()
        return (x * scale).mul_(self.weight)


class GatedMLP:
    """down(silu(gate(x)) · up(x)), with gate and up in one product."""

    __slots__ = ("down", "gate_up", "width")

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down
        self.width = gate_up.weight.shape[0] // 2

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Add the layer's output to `residual` in place."""
        gate_up = self.gate_up(x)  # [num_tokens, 2 * intermediate]
        gate = F.silu(gate_up[:, : self.width])
        return self.down.add_to(residual, gate.mul_(gate_up[:, self.width :]))


class Rotary:
    """Rotates interleaved pairs by position; angles are tabulated once for the whole window."""

    __slots__ = ("table",)

    def __init__(self, rope: RopeConfig, head_dim: int, max_len: int, device: torch.device) -> None:
        frequencies = rotary_frequencies(rope, head_dim)
        angles = torch.outer(torch.arange(max_len, dtype=torch.float64), frequencies.double())
        table = torch.polar(torch.ones_like(angles), angles)
        self.table = table.to(torch.complex64).to(device)  # [max_len, head_dim / 2]

    def at(self, positions: Tensor) -> Tensor:
        """Return the rotations of a step, to be shared by all layers."""
        return self.table.index_select(0, positions).unsqueeze(1)  # [num_tokens, 1, head_dim / 2]

    @staticmethod
    def rotate_(heads: Tensor, rotations: Tensor) -> None:
        """Rotate `heads` [num_tokens, heads, head_dim] in place."""
        if heads.dtype == torch.float32:
            torch.view_as_complex(heads.view(*heads.shape[:-1], -1, 2)).mul_(rotations)
            return
        pairs = torch.view_as_complex(heads.float().view(*heads.shape[:-1], -1, 2))
        heads.copy_(torch.view_as_real(pairs.mul_(rotations)).flatten(-2))


def rotary_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Return the angle per position of each pair, stretched as the config says."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)  # [head_dim / 2]
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3_frequencies(frequencies, rope)
    return frequencies


def _llama3_frequencies(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: long waves are stretched, short ones kept, those between interpolated."""
    window = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = ((window / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies


def interleave_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of each head from halves (x₀…, y₀…) to pairs (x₀, y₀, x₁, y₁, …)."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).flatten(0, 2).contiguous()
