"""Paged attention over block-major KV: a plain reference, and a path that is fast on a CPU.

Rules: both write the step's keys and values to their slots first, then read by block table; they
are tested against each other. The fast path gathers whole blocks (one contiguous copy each) into a
reused buffer, and folds the query heads that share a key-value head into the query dimension,
which the fused kernel takes without repeating keys.
Must not know: requests, weights, who owns the KV.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastserve.model.input_batch import Chunk, DecodeGroup, InputBatch


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

    __slots__ = ("block_size", "layers", "tensor", "token_bytes")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.block_size = tensor.shape[3]
        self.token_bytes = tensor.shape[4] * tensor.shape[5] * tensor.itemsize  # keys, one layer
        self.layers = tuple(
            LayerKV(
                keys=tensor[:, index, 0].flatten(1),
                values=tensor[:, index, 1].flatten(1),
                both=tensor[:, index].flatten(3),
            )
            for index in range(tensor.shape[1])
        )


class Attention(Protocol):
    """Attends the step's tokens to all that came before them."""

    def __call__(self, qkv: Tensor, layer: LayerKV, batch: InputBatch) -> Tensor:
        """Store the new keys and values, return the mixed values.

        qkv: [num_tokens, heads + 2 * kv_heads, head_dim], rotated. Returns [num_tokens, heads *
        head_dim].
        """


def write_kv(qkv: Tensor, layer: LayerKV, batch: InputBatch, num_heads: int) -> None:
    """Store the step's keys and values in their slots."""
    num_tokens, total_heads, _ = qkv.shape
    new = qkv[:, num_heads:].view(num_tokens, 2, (total_heads - num_heads) // 2, -1).flatten(2)
    layer.both[batch.write_blocks, :, batch.write_offsets] = new


class FastAttention:
    """Batched decodes and per-chunk prefill over gathered blocks."""

    def __init__(self, *, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.group_size = num_heads // num_kv_heads
        self.head_dim = head_dim
        self.scale = 1.0 / math.sqrt(head_dim)
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, qkv: Tensor, layer: LayerKV, batch: InputBatch) -> Tensor:
        """Fit `Attention`."""
        write_kv(qkv, layer, batch, self.num_heads)
        parts = [self._decode(qkv, layer, group) for group in batch.groups]
        parts += [self._chunk(qkv, layer, chunk) for chunk in batch.chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _gather(self, name: str, source: Tensor, block_ids: Tensor) -> Tensor:
        """Copy blocks into a buffer that is kept: fresh pages cost more than the copy itself."""
        size = len(block_ids) * source.shape[1]
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != source.dtype:
            buffer = self._buffers[name] = source.new_empty(size + size // 4)
        out = buffer[:size].view(len(block_ids), -1)
        return torch.index_select(source, 0, block_ids, out=out)

    def _decode(self, qkv: Tensor, layer: LayerKV, group: DecodeGroup) -> Tensor:
        rows = group.stop - group.start
        shape = (rows, -1, self.num_kv_heads, self.head_dim)
        query = qkv[group.start : group.stop, : self.num_heads]
        query = query.view(rows, self.num_kv_heads, self.group_size, self.head_dim)
        keys = self._gather("keys", layer.keys, group.block_ids).view(shape)
        values = self._gather("values", layer.values, group.block_ids).view(shape)
        mixed = F.scaled_dot_product_attention(
            query,  # [rows, kv_heads, group, head_dim]
            keys[:, : group.max_context].transpose(1, 2),  # [rows, kv_heads, context, head_dim]
            values[:, : group.max_context].transpose(1, 2),
            attn_mask=group.mask,
            scale=self.scale,
        )
        return mixed.reshape(rows, -1)

    def _chunk(self, qkv: Tensor, layer: LayerKV, chunk: Chunk) -> Tensor:
        tokens = chunk.stop - chunk.start
        heads, kv_heads = self.num_heads, self.num_kv_heads
        part = qkv[chunk.start : chunk.stop]
        if chunk.mask is None:  # it begins its sequence: everything it attends to is at hand
            keys, values = part[:, heads : heads + kv_heads], part[:, heads + kv_heads :]
        else:
            shape = (-1, kv_heads, self.head_dim)
            keys = self._gather("keys", layer.keys, chunk.block_ids).view(shape)[: chunk.context]
            values = self._gather("values", layer.values, chunk.block_ids).view(shape)
            values = values[: chunk.context]
        query = part[:, :heads].view(tokens, kv_heads, self.group_size, self.head_dim)
        expanded = (kv_heads, self.group_size, chunk.context, self.head_dim)
        mixed = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),  # [kv_heads, group, tokens, head_dim]
            keys.transpose(0, 1).unsqueeze(1).expand(expanded),  # stride 0: nothing is repeated
            values.transpose(0, 1).unsqueeze(1).expand(expanded),
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            scale=self.scale,
        )
        return mixed.permute(2, 0, 1, 3).reshape(tokens, -1)


class ReferenceAttention:
    """The definition, one token at a time: softmax(q Kᵀ / √d) V over the positions before it."""

    def __init__(self, *, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim

    def __call__(self, qkv: Tensor, layer: LayerKV, batch: InputBatch) -> Tensor:
        """Fit `Attention`."""
        write_kv(qkv, layer, batch, self.num_heads)
        mixed = []
        for group in batch.groups:
            tables = group.block_ids.view(group.stop - group.start, -1)
            for index, table in enumerate(tables):
                row = group.start + index
                mixed.append(self._attend(qkv[row], layer, table, int(batch.positions[row])))
        for chunk in batch.chunks:
            mixed += [
                self._attend(qkv[row], layer, chunk.block_ids, int(batch.positions[row]))
                for row in range(chunk.start, chunk.stop)
            ]
        return torch.stack(mixed)

    def _attend(self, token: Tensor, layer: LayerKV, table: Tensor, position: int) -> Tensor:
        shape = (-1, self.num_kv_heads, self.head_dim)
        keys = layer.keys[table].view(shape)[: position + 1].float()
        values = layer.values[table].view(shape)[: position + 1].float()
        repeats = self.num_heads // self.num_kv_heads
        keys = keys.repeat_interleave(repeats, dim=1)  # [context, heads, head_dim]
        values = values.repeat_interleave(repeats, dim=1)
        query = token[: self.num_heads].float()
        scores = torch.einsum("hd,chd->hc", query, keys) / math.sqrt(self.head_dim)
        mixed = torch.einsum("hc,chd->hd", scores.softmax(-1), values)
        return mixed.flatten().to(token.dtype)
