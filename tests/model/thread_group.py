"""A tensor-parallel group whose ranks are threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from fastserve.model.parallel import TensorGroup

T = TypeVar("T")


class ThreadGroup:
    """Fits `TensorGroup`: sums are taken in the order of ranks."""

    def __init__(self, rank: int, barrier: threading.Barrier, given: list[Tensor | None]) -> None:
        self.rank = rank
        self.size = len(given)
        self.num_calls = 0
        self._barrier = barrier
        self._given = given  # what each rank brings to the meeting

    def all_reduce(self, x: Tensor) -> Tensor:
        """Fit `TensorGroup`."""
        return x.copy_(torch.stack(self._exchange(x)).cumsum(0)[-1])

    def gather(self, x: Tensor) -> Tensor | None:
        """Fit `TensorGroup`."""
        parts = self._exchange(x)
        return torch.cat(parts, dim=1) if self.rank == 0 else None

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.num_calls += 1
        self._given[self.rank] = x
        self._barrier.wait(timeout=30)
        parts = [part.clone() for part in self._given if part is not None]
        self._barrier.wait(timeout=30)  # nobody writes to what another still reads
        assert {part.shape for part in parts} == {x.shape}, "ranks disagree"
        return parts


def run_ranks(size: int, work: Callable[[TensorGroup], T]) -> list[T]:
    """Return what `work` returns on each rank; raises what one of them raises first."""
    barrier = threading.Barrier(size)
    given: list[Tensor | None] = [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> T | None:
        try:
            with torch.inference_mode():
                return work(ThreadGroup(rank, barrier, given))
        except BaseException as error:
            failures.append(error)
            barrier.abort()
            return None

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(run, range(size)))
    if failures:
        raise failures[0]
    return results  # type: ignore[return-value]
