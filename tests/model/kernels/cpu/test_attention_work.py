"""The work list of attention: whole, without overlap, longest first."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastserve.model.input_batch import Rows, build_input_batch, order_rows
from fastserve.model.kernels.cpu.attention_work import PIECE_QUERIES, attention_work


def rows_of(shares: list[tuple[int, int]]) -> Rows:
    """Return the rows of (start, num_tokens) shares, in the order of a batch."""
    starts, counts = np.array(shares).T
    order = order_rows(starts, counts)
    starts, counts = starts[order], counts[order]
    width = -(-int((starts + counts).max()) // 16)
    return build_input_batch(
        token_ids=np.zeros(int(counts.sum()), np.int64),
        starts=starts,
        counts=counts,
        tables=np.arange(len(shares) * width).reshape(len(shares), width),
        scored=None,
        block_size=16,
        device=torch.device("cpu"),
    ).rows


@pytest.mark.parametrize("group_size", [1, 4, 3 * PIECE_QUERIES])
@pytest.mark.parametrize(
    "shares",
    [[(7, 1)], [(90, 1), (3, 1), (90, 1), (0, 1)], [(5, 1), (0, 200), (64, 100), (900, 1)]],
    ids=["one", "single tokens", "mixed"],
)
def test_every_token_is_in_one_piece(shares: list[tuple[int, int]], group_size: int) -> None:
    """Each with the place and the position that it has; what reads most comes first."""
    rows = rows_of(shares)
    work = attention_work(rows, group_size)
    expected = [
        (row, start + place)
        for row, (start, count) in enumerate(zip(rows.starts, rows.counts, strict=True))
        for place in range(count)
    ]
    found = {
        first + place: (row, position + place)
        for first, count, row, position in work.pieces.tolist()
        for place in range(count)
    }
    assert found == dict(enumerate(expected))
    sizes = work.pieces[:, 1]
    assert sizes.sum() == rows.counts.sum()
    assert sizes.max() <= max(PIECE_QUERIES // group_size, 1)
    costs = (work.pieces[:, 3] + sizes) * sizes
    assert costs.tolist() == sorted(costs.tolist(), reverse=True)
    assert work.positions == costs.sum()
