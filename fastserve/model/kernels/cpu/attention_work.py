"""The work list of a CPU's attention: a step's rows, cut into pieces that threads take in turn.

Must not know: networks, requests, what is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastserve.model.input_batch import IntArray, Rows

PIECE_QUERIES = 64
"""Queries of one sequence and key-value head that share what is read of its keys and values."""


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """The pieces that a step's attention falls into, longest first.

    A piece is a run of consecutive tokens of one sequence: its first token, how many, its row of
    the tables, the position of its first token.
    """

    pieces: Tensor  # [num_pieces, 4]
    tables: Tensor  # [num_rows, blocks] block ids; entries past a token's position are not read
    positions: int  # read in all, which tells whether threads pay


def attention_work(rows: Rows, group_size: int) -> AttentionWork:
    """Cut the rows of a step into pieces; a token has `group_size` queries for a key-value head."""
    if rows.num_single == len(rows.counts):
        return _single_tokens(rows)
    size = max(PIECE_QUERIES // group_size, 1)
    counts, starts = rows.counts, rows.starts
    first_tokens = np.cumsum(counts) - counts
    parts = (counts + size - 1) // size
    row_ids = np.repeat(np.arange(len(counts)), parts)
    first_parts = np.cumsum(parts) - parts
    inner = (np.arange(len(row_ids)) - first_parts[row_ids]) * size
    tokens = np.minimum(counts[row_ids] - inner, size)
    positions = starts[row_ids] + inner
    pieces = np.stack((first_tokens[row_ids] + inner, tokens, row_ids, positions), axis=1)
    costs = (positions + tokens) * tokens
    order = np.argsort(-costs, kind="stable")
    return _work(pieces[order], rows.tables, int(costs.sum()))


def _single_tokens(rows: Rows) -> AttentionWork:
    """Make each row a piece; rows come by context, the shortest first."""
    num_rows = len(rows.starts)
    pieces = np.empty((num_rows, 4), np.int64)
    pieces[:, 0] = pieces[:, 2] = np.arange(num_rows)[::-1]
    pieces[:, 1] = 1
    pieces[:, 3] = rows.starts[::-1]
    return _work(pieces, rows.tables, int(rows.contexts.sum()))


def _work(pieces: IntArray, tables: IntArray, positions: int) -> AttentionWork:
    """Put arrays into tensors, which say where they lie in a tenth of an array's time."""
    return AttentionWork(
        torch.from_numpy(np.ascontiguousarray(pieces)),
        torch.from_numpy(np.ascontiguousarray(tables)),
        positions,
    )
