"""InputBatch: the tensors of one step.

Rules: built with numpy from whole arrays; rows (a sequence's share of the step) come ordered by
`order_rows`, single tokens first, so that attention splits decodes from chunks by slicing. Unused
table entries repeat a block of the same row: padding may be read (and masked), so it must never
name a block of another request. How attention groups or pads rows is its own business.
Must not know: requests, sampling, kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """Each sequence's share of the step, on the host."""

    starts: IntArray  # [num_rows] first position
    counts: IntArray  # [num_rows] tokens
    contexts: IntArray  # [num_rows] starts + counts: tokens that the last one attends to
    num_blocks: IntArray  # [num_rows] blocks of the table that are in use
    tables: IntArray  # [num_rows, blocks] block ids, padded with the row's first
    num_single: int  # rows of one token; they come first


@dataclass(frozen=True, slots=True)
class InputBatch:
    """What the network computes in one step."""

    rows: Rows
    token_ids: Tensor  # [num_tokens]
    positions: Tensor  # [num_tokens]
    write_blocks: Tensor  # [num_tokens]
    write_offsets: Tensor  # [num_tokens]
    scored: Tensor | None  # [num_scored] token rows that get logits; None: every row in order


def order_rows(
    starts: Sequence[int] | IntArray, counts: Sequence[int] | IntArray
) -> list[int]:  # [num_rows]
    """Return the order in which rows enter a batch: single tokens by context, then chunks."""
    by_context = sorted(range(len(starts)), key=starts.__getitem__)
    return sorted(by_context, key=lambda row: counts[row] > 1)  # which leaves equals in order


def build_input_batch(
    *,
    token_ids: IntArray,  # [num_tokens], in row order
    starts: IntArray,  # [num_rows] first position
    counts: IntArray,  # [num_rows] tokens
    tables: IntArray,  # [num_rows, blocks] padded
    scored: IntArray | None,
    block_size: int,
    device: torch.device,
) -> InputBatch:
    """Build the tensors of a step from rows that `order_rows` has ordered."""
    num_rows, num_tokens = len(starts), len(token_ids)
    contexts = starts + counts
    used = (contexts + block_size - 1) // block_size
    tables = np.where(np.arange(tables.shape[1]) < used[:, None], tables, tables[:, :1])
    if num_rows == num_tokens:
        rows, positions, num_single = np.arange(num_rows), starts, num_rows
    else:
        rows = np.repeat(np.arange(num_rows), counts)
        first = np.cumsum(counts) - counts
        positions = np.arange(num_tokens) + np.repeat(starts - first, counts)
        num_single = int(np.count_nonzero(counts == 1))
    columns, offsets = np.divmod(positions, block_size)

    def tensor(array: IntArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return InputBatch(
        rows=Rows(starts, counts, contexts, used, tables, num_single),
        token_ids=tensor(token_ids),
        positions=tensor(positions),
        write_blocks=tensor(tables[rows, columns]),
        write_offsets=tensor(offsets),
        scored=None if scored is None else tensor(scored),
    )
