"""InputBatch: the tensors of one step.

Rules: built with numpy from whole arrays; rows (a sequence's share of the step) come ordered by
`order_rows`, single tokens first, so that attention splits decodes from chunks by slicing. Single
tokens of similar context form groups, each padded to its own longest. Unused table entries repeat
a block of the same row: padding is read (and masked), so it must never name a stranger's block.
Must not know: requests, sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]

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


@dataclass(frozen=True, slots=True)
class InputBatch:
    """What the network computes in one step."""

    token_ids: Tensor  # [num_tokens]
    positions: Tensor  # [num_tokens]
    write_blocks: Tensor  # [num_tokens]
    write_offsets: Tensor  # [num_tokens]
    groups: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]
    scored: Tensor | None  # [num_scored] token rows that get logits; None: every row in order


def order_rows(starts: IntArray, counts: IntArray) -> IntArray:
    """Return the order in which rows enter a batch: single tokens by context, then chunks."""
    return np.lexsort((starts, counts > 1))


def build_input_batch(
    *,
    token_ids: IntArray,  # [num_tokens], in row order
    starts: IntArray,  # [num_rows] first position
    counts: IntArray,  # [num_rows] tokens
    tables: IntArray,  # [num_rows, blocks] padded
    scored: IntArray | None,
    block_size: int,
    token_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
) -> InputBatch:
    """Build the tensors of a step from rows that `order_rows` has ordered."""
    num_rows, num_tokens = len(starts), len(token_ids)
    contexts = starts + counts
    used = (contexts + block_size - 1) // block_size
    tables = np.where(np.arange(tables.shape[1]) < used[:, None], tables, tables[:, :1])
    if num_rows == num_tokens:
        rows, positions = np.arange(num_rows), starts
    else:
        rows = np.repeat(np.arange(num_rows), counts)
        first = np.cumsum(counts) - counts
        positions = np.arange(num_tokens) + np.repeat(starts - first, counts)
    num_single = int(np.count_nonzero(counts == 1))

    def tensor(array: IntArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    groups = []
    max_tokens = GROUP_BYTES // token_bytes if device.type == "cpu" else None
    for start, stop in split_groups(contexts[:num_single], max_tokens):
        longest = int(contexts[stop - 1])
        group_contexts = contexts[start:stop]
        mask = None
        if group_contexts[0] != longest:
            visible = np.arange(longest) < group_contexts[:, None]
            mask = _additive(visible, dtype, device)[:, None, None, :]
        ids = tensor(tables[start:stop, : used[stop - 1]].reshape(-1))
        groups.append(DecodeGroup(start, stop, longest, ids, mask))

    chunks = []
    start = num_single
    for row in range(num_single, num_rows):
        stop, context = start + int(counts[row]), int(contexts[row])
        mask = None
        if starts[row]:
            visible = np.arange(context) <= positions[start:stop, None]
            mask = _additive(visible, dtype, device)
        chunks.append(Chunk(start, stop, context, tensor(tables[row, : used[row]]), mask))
        start = stop

    return InputBatch(
        token_ids=tensor(token_ids),
        positions=tensor(positions),
        write_blocks=tensor(tables[rows, positions // block_size]),
        write_offsets=tensor(positions % block_size),
        groups=tuple(groups),
        chunks=tuple(chunks),
        scored=None if scored is None else tensor(scored),
    )


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
