"""Ops: what networks are made of, on one device, in one dtype and mode.

Rules: a network asks its Ops for its parts when it is built, and only calls them afterwards; what
differs between devices and modes is inside the parts, never in a network.
Must not know: architectures, checkpoints, batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from fastserve.checkpoint.activation import Activation
from fastserve.model.attention.interfaces import Attention, LayerAttention, LayerKV, PagedKV
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.input_batch import InputBatch


class LinearOp(Protocol):
    """y = x Wᵀ + b."""

    out_width: int
    is_rowwise: bool  # whether the bits of a row depend on that row alone

    def __call__(self, x: Tensor) -> Tensor:
        """Project the rows of `x` [num_tokens, in] to [num_tokens, out]."""

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Add the projection to `residual` [num_tokens, out] in place and return it."""


class NormOp(Protocol):
    """A normalization over the last dimension."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x` normalized, in its dtype; statistics are taken in float32."""


class HeadNormOp(Protocol):
    """A normalization of the first heads of every token, each with a weight of its own."""

    def __call__(self, qkv: Tensor) -> None:
        """Normalize them in place: `qkv` is [num_tokens, all_heads, head_dim], contiguous."""


class MLPOp(Protocol):
    """A feed-forward part."""

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Add the part's output to `residual` [num_tokens, hidden] in place and return it."""


class DecoderLayer(Protocol):
    """Attention and an MLP, each added to the stream."""

    def attend(
        self,
        hidden: Tensor,  # [num_tokens, hidden]
        rotations: Tensor | None,
        layer_kv: LayerKV,
        attention: LayerAttention,
    ) -> Tensor:
        """Return the mixed values of the step's tokens, before the output projection."""

    def add_outputs(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """Add attention's output and the MLP's to the stream, which may be overwritten."""


class Layers(Protocol):
    """The layers of a stage, one after another."""

    def __call__(
        self,
        hidden: Tensor,  # [num_tokens, hidden]; may be overwritten
        rotations: Tensor | None,  # as `Rotary.at` returns them
        batch: InputBatch,
        kv: PagedKV,
        scored: Tensor | None,  # [num_scored] token rows that are wanted; None: every row
    ) -> Tensor:
        """Return the stream behind the last layer, of the rows that are wanted."""


class Ops(Protocol):
    """Makes the parts of a network."""

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> LinearOp:
        """Make a projection of `weight` [out, in] and `bias` [out]; it may keep its own copy.

        It computes in the dtype of `weight`, which for a router is float32 in every network.
        """

    def rms_norm(self, weight: Tensor, eps: float) -> NormOp:
        """Make x / rms(x) · weight."""

    def head_rms_norm(self, weight: Tensor, eps: float) -> HeadNormOp:
        """Make the same of heads, with `weight` [normed_heads, head_dim]."""

    def layer_norm(self, weight: Tensor | None, bias: Tensor | None, eps: float) -> NormOp:
        """Make (x - mean(x)) / std(x) · weight + bias; None where there is no such factor."""

    def mlp(self, up: LinearOp, activation: Activation, down: LinearOp) -> MLPOp:
        """Make down(activation(up(x)))."""

    def gated_mlp(self, gate_up: LinearOp, down: LinearOp) -> MLPOp:
        """Make down(silu(gate(x)) · up(x)); `gate_up` yields gate, then up."""

    def attention(self, shape: AttentionShape) -> Attention:
        """Make paged attention."""

    def layers(self, layers: Sequence[DecoderLayer], attention: Attention) -> Layers:
        """Make one of layers that are made of these parts, and their attention."""
