"""Rotary position embedding, over interleaved pairs.

Rules: rotary pairs are interleaved in memory: the loader permutes the rows of the query and key
projections, so that rotation is one complex product. Scores do not change, since queries and keys
are permuted alike. Must not know: paging, batches, checkpoints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastserve.checkpoint.config_rope import RopeConfig


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
