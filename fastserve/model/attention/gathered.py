"""Paged attention in plain torch: whole blocks are gathered, then the fused kernel runs on them.

Rules: single tokens of similar context form groups, each padded to its own longest; every chunk is
a call of its own. Blocks are gathered (one contiguous copy each) into a reused buffer, and the
query heads that share a key-value head are folded into the query dimension, which the fused kernel
takes without repeating keys. Must not know: requests, weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fastserve.model.attention.interfaces import LayerAttention, LayerKV, rotate_and_write
from fastserve.model.attention.shape import AttentionShape
from fastserve.model.input_batch import InputBatch, IntArray

SPLIT_TOKENS = 2048
"""Padded tokens that are worth an attention call of their own."""

GROUP_BYTES = 2**20
"""Keys of one group on a CPU: what is gathered must still be in its cache when it is read."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Single-token rows [start, stop) of the batch, padded to `max_context` tokens."""

    start: int
    stop: int
    max_context: int
    block_ids: Tensor  # [(stop - start) * blocks]
    mask: Tensor | None  # [stop - start, 1, 1, max_context], 0 or -inf; None: nothing is padded


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, stop) of the batch: consecutive positions of one sequence."""

    start: int
    stop: int
    context: int  # tokens attended to by the last one
    block_ids: Tensor  # [blocks]
    mask: Tensor | None  # [stop - start, context], 0 or -inf; None: it begins its sequence


class GatheredAttention:
    """Batched decodes and per-chunk prefill over gathered blocks."""

    def __init__(self, shape: AttentionShape, dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self._buffers: dict[str, Tensor] = {}

    def plan(self, batch: InputBatch) -> LayerAttention:
        groups, chunks = self._groups(batch), self._chunks(batch)

        def run(qkv: Tensor, rotations: Tensor | None, layer: LayerKV) -> Tensor:
            rotate_and_write(qkv, rotations, layer, batch, self.shape.num_heads)
            parts = [self._decode(qkv, layer, group) for group in groups]
            parts += [self._chunk(qkv, layer, chunk) for chunk in chunks]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return run

    def _groups(self, batch: InputBatch) -> list[DecodeGroup]:
        rows, device = batch.rows, batch.token_ids.device
        token_bytes = self.shape.num_kv_heads * self.shape.head_dim * self.dtype.itemsize
        max_tokens = GROUP_BYTES // token_bytes if device.type == "cpu" else None
        groups = []
        for start, stop in split_groups(rows.contexts[: rows.num_single], max_tokens):
            contexts = rows.contexts[start:stop]
            longest = int(contexts[-1])
            mask = None
            if contexts[0] != longest:
                visible = np.arange(longest) < contexts[:, None]
                mask = _additive(visible, self.dtype, device)[:, None, None, :]
            table = rows.tables[start:stop, : rows.num_blocks[stop - 1]].reshape(-1)
            ids = torch.from_numpy(np.ascontiguousarray(table)).to(device)
            groups.append(DecodeGroup(start, stop, longest, ids, mask))
        return groups

    def _chunks(self, batch: InputBatch) -> list[Chunk]:
        rows, device = batch.rows, batch.token_ids.device
        chunks = []
        start = rows.num_single
        for row in range(rows.num_single, len(rows.starts)):
            first, context = int(rows.starts[row]), int(rows.contexts[row])
            stop = start + int(rows.counts[row])
            mask = None
            if first:
                visible = np.arange(context) <= np.arange(first, context)[:, None]
                mask = _additive(visible, self.dtype, device)
            ids = torch.from_numpy(rows.tables[row, : rows.num_blocks[row]]).to(device)
            chunks.append(Chunk(start, stop, context, ids, mask))
            start = stop
        return chunks

    def _gather(self, name: str, source: Tensor, block_ids: Tensor) -> Tensor:
        """Copy blocks into a buffer that is kept: fresh pages cost more than the copy itself."""
        size = len(block_ids) * source.shape[1]
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != source.dtype:
            buffer = self._buffers[name] = source.new_empty(size + size // 4)
        out = buffer[:size].view(len(block_ids), -1)
        return torch.index_select(source, 0, block_ids, out=out)

    def _decode(self, qkv: Tensor, layer: LayerKV, group: DecodeGroup) -> Tensor:
        rows, shape = group.stop - group.start, self.shape
        gathered = (rows, -1, shape.num_kv_heads, shape.head_dim)
        query = qkv[group.start : group.stop, : shape.num_heads]
        query = query.view(rows, shape.num_kv_heads, shape.group_size, shape.head_dim)
        keys = self._gather("keys", layer.keys, group.block_ids).view(gathered)
        values = self._gather("values", layer.values, group.block_ids).view(gathered)
        mixed = F.scaled_dot_product_attention(
            query,  # [rows, kv_heads, group, head_dim]
            keys[:, : group.max_context].transpose(1, 2),  # [rows, kv_heads, context, head_dim]
            values[:, : group.max_context].transpose(1, 2),
            attn_mask=group.mask,
            scale=self.shape.scale,
        )
        return mixed.reshape(rows, -1)

    def _chunk(self, qkv: Tensor, layer: LayerKV, chunk: Chunk) -> Tensor:
        tokens = chunk.stop - chunk.start
        heads, kv_heads, head_dim = (
            self.shape.num_heads,
            self.shape.num_kv_heads,
            self.shape.head_dim,
        )
        part = qkv[chunk.start : chunk.stop]
        if chunk.mask is None:  # it begins its sequence: everything it attends to is at hand
            keys, values = part[:, heads : heads + kv_heads], part[:, heads + kv_heads :]
        else:
            shape = (-1, kv_heads, head_dim)
            keys = self._gather("keys", layer.keys, chunk.block_ids).view(shape)[: chunk.context]
            values = self._gather("values", layer.values, chunk.block_ids).view(shape)
            values = values[: chunk.context]
        query = part[:, :heads].view(tokens, kv_heads, self.shape.group_size, head_dim)
        expanded = (kv_heads, self.shape.group_size, chunk.context, head_dim)
        mixed = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),  # [kv_heads, group, tokens, head_dim]
            keys.transpose(0, 1).unsqueeze(1).expand(expanded),  # stride 0: nothing is repeated
            values.transpose(0, 1).unsqueeze(1).expand(expanded),
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            scale=self.shape.scale,
        )
        return mixed.permute(2, 0, 1, 3).reshape(tokens, -1)


def split_groups(contexts: IntArray, max_tokens: int | None) -> list[tuple[int, int]]:
    """Cut ascending contexts into runs [start, stop), wherever that saves enough padding.

    With `max_tokens`, runs of several rows hold no more padded tokens than that.
    """
    runs: list[tuple[int, int]] = []
    pending = [(0, len(contexts))] if len(contexts) else []
    while pending:
        start, stop = pending.pop()
        longest = int(contexts[stop - 1])
        sizes = np.arange(1, stop - start)
        saved = sizes * (longest - contexts[start : stop - 1])
        best = int(np.argmax(saved)) if len(saved) else -1
        if best >= 0 and saved[best] > SPLIT_TOKENS:
            middle = start + best + 1
            pending += [(middle, stop), (start, middle)]
            continue
        most = stop - start if max_tokens is None else max(max_tokens // longest, 1)
        runs += [(first, min(first + most, stop)) for first in range(start, stop, most)]
    return runs


def _additive(visible: npt.NDArray[np.bool_], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Turn a visibility matrix into what is added to scores.

    Attention would otherwise convert a boolean mask again in every layer.
    """
    mask = np.where(visible, np.float32(0.0), np.float32(-np.inf))
    return torch.from_numpy(mask).to(device=device, dtype=dtype)
