"""BlockChecks: holds what comes back from the host tier against what went there, for tests.

Rules: a checksum of each block is taken on the device before it is copied out, and again after it
was copied in; between them it is kept by the place on the host. A block that comes from a place
where none went is a mismatch. Both lanes of a copier call it, each on its thread.
Must not know: how blocks are copied.
"""

from __future__ import annotations

import threading
import zlib

import torch

from fastserve.core.messages import Copy, CopyDirection
from fastserve.executor.kv_store import KVStore


class BlockChecks:
    """Counts the blocks that moved, and those that are not what they were."""

    def __init__(self, kv: KVStore) -> None:
        self.num_moves = 0
        self.num_mismatches = 0
        self._kv = kv
        self._sums: dict[int, int] = {}  # by the place on the host
        self._lock = threading.Lock()

    def leaving(self, copy: Copy) -> None:
        """Note what a copy out is about to take."""
        if copy.direction is CopyDirection.SWAP_OUT:
            sums = [self._sum(block_id) for block_id in copy.src]
            with self._lock:
                self._sums.update(zip(copy.dst, sums, strict=True))

    def arrived(self, copy: Copy) -> None:
        """Count a copy that is done, and look at what a copy in has brought."""
        is_in = copy.direction is CopyDirection.SWAP_IN
        sums = [self._sum(block_id) for block_id in copy.dst] if is_in else []
        with self._lock:
            self.num_moves += len(copy.src)
            if is_in:
                expected = [self._sums.get(block_id) for block_id in copy.src]
                self.num_mismatches += sum(
                    found != known for found, known in zip(sums, expected, strict=True)
                )

    def _sum(self, block_id: int) -> int:
        block = self._kv.device.tensor[block_id].flatten().view(torch.uint8)
        return zlib.crc32(block.cpu().numpy().data)
