"""Poison: KV blocks that no request may read are NaN, so that a test sees who reads them.

Rules: a block is blanked as it enters a table behind all that is computed, for unwritten slots in
use get weight zero, and zero times NaN is NaN. It is poisoned again once the last request that has
it is forgotten, unless it is full and may live on as prefix cache. A request from which a block was
taken still names it, and has no say in it. Must not know: which blocks the scheduler holds free.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastserve.core.messages import Work
from fastserve.core.request import Handle


class Poison:
    """Over the KV `tensor` of one rank, by block; all of it is poisoned at first."""

    def __init__(self, tensor: Tensor, block_size: int, *, spares_full_blocks: bool) -> None:
        self._tensor = tensor
        self._block_size = block_size
        self._spares_full_blocks = spares_full_blocks
        self._owners: dict[int, set[Handle]] = {}
        tensor.fill_(torch.nan)

    def enter(self, work: Work) -> None:
        """Let a request have the blocks that enter its table."""
        for index, block_id in enumerate(work.block_ids, work.table_from):
            if index * self._block_size >= work.start:
                self._tensor[block_id].zero_()
                self._owners[block_id] = {work.handle}
            else:
                self._owners.setdefault(block_id, set()).add(work.handle)

    def leave(self, handle: Handle, block_ids: Sequence[int], num_tokens: int) -> None:
        """Take its blocks from a request of which `num_tokens` ids are known."""
        first = num_tokens // self._block_size if self._spares_full_blocks else 0
        for index, block_id in enumerate(block_ids):
            owners = self._owners.get(block_id, set())
            if handle in owners:
                owners.remove(handle)
                if not owners and index >= first:
                    self.spoil(block_id)

    def spoil(self, block_id: int) -> None:
        """Make one block unreadable: what reads it computes NaN."""
        self._tensor[block_id].fill_(torch.nan)
