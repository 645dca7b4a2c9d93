"""WeightMemory: where weights lie that a step reads from beginning to end.

Rules: weights lie one after the other in pieces of memory so large that numpy asks the system for
huge pages: with small ones a processor that streams through them stops at every page, and a weight
of less than two huge pages by itself would get none. A piece is as long-lived as the last tensor in
it. Must not know: what is kept.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SLAB_BYTES = 64 * 2**20
ALIGNMENT = 64  # bytes: a line of the cache


class WeightMemory:
    """Keeps tensors side by side. Memory of a slab that nothing lies in yet is not touched."""

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._num_used = 0  # bytes of the slab

    def keep(self, tensor: Tensor) -> Tensor:
        """Return `tensor`, contiguous, in memory of ours."""
        num_bytes = tensor.nbytes
        if self._num_used + num_bytes > len(self._slab):
            self._slab = _slab(max(SLAB_BYTES, num_bytes + ALIGNMENT))
            self._num_used = -self._slab.data_ptr() % ALIGNMENT
        memory = self._slab[self._num_used : self._num_used + num_bytes]
        self._num_used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _slab(num_bytes: int) -> Tensor:
    return torch.from_numpy(np.empty(num_bytes, dtype=np.uint8))
