"""Poison: KV blocks that no request may read are NaN, so that a test sees who reads them.

Rules: a block is blanked as it enters a table behind all that is computed, for unwritten slots in
use get weight zero, and zero times NaN is NaN. It is poisoned again once the last request that has
it is forgotten, unless it is full and may live on as prefix cache. A request from which a block was
taken still names it, and has no say in it; what is copied into a block is nobody's until it enters
a table. Places on the host that nothing was copied to are as good as NaN: they become it when they
are copied from, for most are never touched. The compute thread and the one that submits copies use
it: under one lock, and what it wrote is in memory before it lets go.
Must not know: which blocks the scheduler holds free.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import torch

from fastserve.core.messages import Copy, CopyDirection, Work
from fastserve.core.request import Handle
from fastserve.executor.kv_store import KVStore


class Poison:
    """Over the KV of one rank, by block; all of the device's is poisoned at first."""

    def __init__(self, kv: KVStore, block_size: int, *, spares_full_blocks: bool) -> None:
        self._kv = kv
        self._block_size = block_size
        self._spares_full_blocks = spares_full_blocks
        self._owners: dict[int, set[Handle]] = {}
        self._filled: set[int] = set()  # places on the host that something was copied to
        self._lock = threading.Lock()
        kv.device.tensor.fill_(torch.nan)
        self._settle()

    def enter(self, work: Work) -> None:
        """Let a request have the blocks that enter its table."""
        with self._lock:
            for index, block_id in enumerate(work.block_ids, work.table_from):
                if index * self._block_size >= work.start:
                    self._kv.device.tensor[block_id].zero_()
                    self._owners[block_id] = {work.handle}
                else:
                    self._owners.setdefault(block_id, set()).add(work.handle)

    def leave(self, handle: Handle, block_ids: Sequence[int], num_tokens: int) -> None:
        """Take its blocks from a request of which `num_tokens` ids are known."""
        first = num_tokens // self._block_size if self._spares_full_blocks else 0
        with self._lock:
            for index, block_id in enumerate(block_ids):
                owners = self._owners.get(block_id, set())
                if handle in owners:
                    owners.remove(handle)
                    if not owners and index >= first:
                        self._kv.device.tensor[block_id].fill_(torch.nan)
            self._settle()

    def move(self, copy: Copy) -> None:
        """Let a copy have the blocks that it is to fill, before it begins."""
        with self._lock:
            if copy.direction is CopyDirection.SWAP_OUT:
                self._filled.update(copy.dst)
                return
            for block_id in copy.dst:
                self._owners.pop(block_id, None)
            for block_id in copy.src:
                if block_id not in self._filled and block_id < self._kv.host.num_blocks:
                    self._kv.host[block_id].fill_(torch.nan)

    def spoil(self, device_ids: Iterable[int], host_ids: Iterable[int] = ()) -> None:
        """Make blocks that nothing uses unreadable: what reads them computes NaN."""
        with self._lock:
            for block_id in device_ids:
                self._kv.device.tensor[block_id].fill_(torch.nan)
            for block_id in host_ids:
                self._kv.host[block_id].fill_(torch.nan)
            self._settle()

    def _settle(self) -> None:
        # Copies run on streams of their own: they must not come before what was poisoned here.
        if self._kv.device.tensor.is_cuda:
            torch.cuda.current_stream().synchronize()
