"""StagedBatch: a step's input, brought to the device in one transfer.

Rules: every section of the staging buffer begins at a multiple of 16 ints, so that kernels are
compiled for one alignment; on CUDA the host side is pinned, and torch's allocator keeps it until
the transfer is over. Must not know: requests, how attention is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastserve.model.input_batch import InputBatch, IntArray, Rows

ALIGNMENT = 16
"""Ints: 64 bytes."""

CHUNK_TILE = 64
"""Tokens of one chunk that are attended together."""


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """What paged attention reads on the device; int32."""

    positions: Tensor  # [num_tokens]
    token_rows: Tensor  # [num_tokens] row of the table; negative: padding, which attends to nothing
    table_width: Tensor  # [1]
    tables: Tensor  # [num_rows * table_width] and more
    tile_tokens: Tensor  # [num_tiles] first token of each tile of a chunk
    tile_lengths: Tensor  # [num_tiles]
    max_context: int


@dataclass(frozen=True, slots=True)
class StagedBatch(InputBatch):
    """An InputBatch whose tensors, and those of its attention, are parts of one buffer."""

    attention: DeviceRows


def stage(batch: InputBatch, device: torch.device) -> StagedBatch:
    """Bring a batch that lies on the host to the device."""
    parts = input_parts(batch)
    if batch.scored is not None:
        parts.append(batch.scored.numpy())
    return staged(batch, send(parts, device))


def input_parts(batch: InputBatch) -> list[IntArray]:
    """Return what the device needs of a batch that lies on the host."""
    tensors = (batch.token_ids, batch.positions, batch.write_blocks, batch.write_offsets)
    return [*(tensor.numpy() for tensor in tensors), *_attention_parts(batch.rows)]


def staged(batch: InputBatch, views: Sequence[Tensor]) -> StagedBatch:
    """Return the batch over the device's copies of its parts, and of `scored` after them."""
    token_ids, positions, write_blocks, write_offsets = views[:4]
    return StagedBatch(
        rows=batch.rows,
        token_ids=token_ids,
        positions=positions,
        write_blocks=write_blocks,
        write_offsets=write_offsets,
        scored=None if batch.scored is None else views[-1],
        attention=_device_rows(positions, views[4:9], batch.rows),
    )


def device_rows(batch: InputBatch) -> DeviceRows:
    """Return what attention reads of any batch; one that is not staged costs a transfer."""
    if isinstance(batch, StagedBatch):
        return batch.attention
    views = send(_attention_parts(batch.rows), batch.positions.device)
    return _device_rows(batch.positions, views, batch.rows)


def send(parts: Sequence[IntArray], device: torch.device) -> list[Tensor]:
    """Bring arrays of ints to the device as int32, in one transfer."""
    host, places = pack(parts, is_pinned=device.type == "cuda")
    return unpack(host.to(device, non_blocking=True), places)


def pack(parts: Sequence[IntArray], *, is_pinned: bool) -> tuple[Tensor, list[tuple[int, int]]]:
    """Write arrays one after the other; returns the buffer and (start, length) of each."""
    places, start = [], 0
    for part in parts:
        places.append((start, part.size))
        start += aligned(part.size)
    host = torch.empty(start, dtype=torch.int32, pin_memory=is_pinned)
    buffer: npt.NDArray[np.int32] = host.numpy()
    for part, (begin, size) in zip(parts, places, strict=True):
        buffer[begin : begin + size] = part.reshape(-1)
    return host, places


def aligned(size: int) -> int:
    """Return the ints that a part of this size takes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def unpack(buffer: Tensor, places: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return views of the parts that `pack` wrote."""
    return [buffer[start : start + length] for start, length in places]


def tiles_of(rows: Rows) -> tuple[IntArray, IntArray]:
    """Return the first token and the length of each tile of the chunks."""
    counts = rows.counts[rows.num_single :]
    per_chunk = -(-counts // CHUNK_TILE)
    chunks = np.repeat(np.arange(len(counts)), per_chunk)
    within = np.arange(len(chunks)) - np.repeat(np.cumsum(per_chunk) - per_chunk, per_chunk)
    first = rows.num_single + np.cumsum(counts) - counts
    lengths = np.minimum(counts[chunks] - within * CHUNK_TILE, CHUNK_TILE)
    return first[chunks] + within * CHUNK_TILE, lengths


def _attention_parts(rows: Rows) -> list[IntArray]:
    token_rows = np.repeat(np.arange(len(rows.counts)), rows.counts)
    width = np.array([rows.tables.shape[1]])
    return [token_rows, *tiles_of(rows), width, rows.tables]


def _device_rows(positions: Tensor, views: Sequence[Tensor], rows: Rows) -> DeviceRows:
    token_rows, tile_tokens, tile_lengths, table_width, tables = views
    return DeviceRows(
        positions=positions,
        token_rows=token_rows,
        table_width=table_width,
        tables=tables,
        tile_tokens=tile_tokens,
        tile_lengths=tile_lengths,
        max_context=int(rows.contexts.max()),
    )
