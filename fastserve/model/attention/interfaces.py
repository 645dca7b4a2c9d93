"""Paged attention over block-major KV: what every kind of it fits, and the plain definition.

Rules: an attention is planned once per step and then run once per layer; it rotates the step's
queries and keys, writes keys and values to their slots, and reads by block table. Every kind is
tested against ReferenceAttention. Must not know: requests, weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastserve.model.attention.rotary import Rotary
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.input_batch import InputBatch


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Views of one layer's share of the KV tensor."""

    keys: Tensor  # [num_blocks, block_size * kv_heads * head_dim]
    values: Tensor  # the same
    both: Tensor  # [num_blocks, 2, block_size, kv_heads * head_dim]


class PagedKV:
    """The KV tensor [num_blocks, layers, 2, block_size, kv_heads, head_dim] and its layer views.

    A block is one contiguous piece whatever the depth, so that moving one is one copy.
    """

    __slots__ = ("block_size", "layers", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.block_size = tensor.shape[3]
        self.layers = tuple(
            LayerKV(
                keys=tensor[:, index, 0].flatten(1),
                values=tensor[:, index, 1].flatten(1),
                both=tensor[:, index].flatten(3),
            )
            for index in range(tensor.shape[1])
        )


class LayerAttention(Protocol):
    """Attends the tokens of one step to all that came before them, in one layer."""

    def __call__(self, qkv: Tensor, rotations: Tensor | None, layer: LayerKV) -> Tensor:
        """Rotate queries and keys, store the new keys and values, return the mixed values.

        qkv: [num_tokens, heads + 2 * kv_heads, head_dim], may be overwritten. rotations: as
        `Rotary.at` returns them; None where positions are not rotary. Returns [num_tokens, heads *
        head_dim].
        """


class Attention(Protocol):
    """One way to compute attention, for models of one shape."""

    def plan(self, batch: InputBatch) -> LayerAttention:
        """Prepare what all layers of a step share."""


def rotate_and_write(
    qkv: Tensor, rotations: Tensor | None, layer: LayerKV, batch: InputBatch, num_heads: int
) -> None:
    """Rotate in place, and store the step's keys and values in their slots."""
    num_tokens, total_heads, _ = qkv.shape
    num_kv_heads = (total_heads - num_heads) // 2
    if rotations is not None:
        Rotary.rotate_(qkv[:, : num_heads + num_kv_heads], rotations)
    new = qkv[:, num_heads:].view(num_tokens, 2, num_kv_heads, -1).flatten(2)
    layer.both[batch.write_blocks, :, batch.write_offsets] = new


class ReferenceAttention:
    """The definition, one token at a time: softmax(scale · q Kᵀ) V over the positions before it."""

    def __init__(self, shape: AttentionShape) -> None:
        self.shape = shape

    def plan(self, batch: InputBatch) -> LayerAttention:
        rows = batch.rows
        tables = [
            torch.from_numpy(table[:used]).to(batch.token_ids.device)
            for table, used, count in zip(rows.tables, rows.num_blocks, rows.counts, strict=True)
            for _ in range(count)
        ]  # of each token
        positions = batch.positions.tolist()

        def run(qkv: Tensor, rotations: Tensor | None, layer: LayerKV) -> Tensor:
            rotate_and_write(qkv, rotations, layer, batch, self.shape.num_heads)
            mixed = [
                self._attend(token, layer, table, position)
                for token, table, position in zip(qkv, tables, positions, strict=True)
            ]
            return torch.stack(mixed)

        return run

    def _attend(self, token: Tensor, layer: LayerKV, table: Tensor, position: int) -> Tensor:
        shape = self.shape
        rows = (-1, shape.num_kv_heads, shape.head_dim)
        keys = layer.keys[table].view(rows)[: position + 1].float()
        values = layer.values[table].view(rows)[: position + 1].float()
        keys = keys.repeat_interleave(shape.group_size, dim=1)  # [context, heads, head_dim]
        values = values.repeat_interleave(shape.group_size, dim=1)
        query = token[: shape.num_heads].float()
        scores = torch.einsum("hd,chd->hc", query, keys) * shape.scale
        mixed = torch.einsum("hc,chd->hd", scores.softmax(-1), values)
        return mixed.flatten().to(token.dtype)
