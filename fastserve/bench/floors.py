"""What bounds a step on this machine: the speed of a plain memory copy and of a matrix product.

Rules: plain torch operations, larger than any cache, on the threads and in the dtype of the model.
Must not know: the model, what the floors are compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

COPIED_BYTES = 256 * 2**20
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}


class Floors:
    """Holds the operands, so that measuring again allocates nothing."""

    def __init__(self, dtype: str, device: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._device = torch.device(device)
        self._source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=self._device)
        self._target = torch.empty_like(self._source)
        size = PRODUCT_SIZE[self._device.type]
        shape = {"dtype": getattr(torch, dtype), "device": self._device}
        self._left = torch.ones(size, size, **shape)
        self._right = torch.ones(size, size, **shape)
        self._product = torch.empty(size, size, **shape)

    @torch.inference_mode()
    def copy_gb_per_s(self) -> float:
        """Return the speed of a copy: bytes read plus bytes written, 10⁹ a second."""
        seconds = self._time(lambda: self._target.copy_(self._source))
        return 2 * COPIED_BYTES / seconds / 1e9

    @torch.inference_mode()
    def product_gflop_per_s(self) -> float:
        """Return the speed of a square product, two operations for each multiply-add."""
        seconds = self._time(lambda: torch.mm(self._left, self._right, out=self._product))
        return float(2 * len(self._left) ** 3 / seconds / 1e9)

    def _time(self, run: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
