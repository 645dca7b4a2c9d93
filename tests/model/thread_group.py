"""A tensor-parallel group whose ranks are threads of one process.

Rules: one of them computes at a time, until all have come to where they meet: what is tested need
not bear threads, as Triton's interpreter does not.
"""

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

    def __init__(
        self,
        rank: int,
        barrier: threading.Barrier,
        turn: threading.Lock,
        given: list[Tensor | None],
    ) -> None:
        self.rank = rank
        self.size = len(given)
        self.num_calls = 0
        self._barrier = barrier
        self._turn = turn
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
        self._meet()
        parts = [part.clone() for part in self._given if part is not None]
        self._meet()  # nobody writes to what another still reads
        assert {part.shape for part in parts} == {x.shape}, "ranks disagree"
        return parts

    def _meet(self) -> None:
        self._turn.release()
        try:
            self._barrier.wait(timeout=60)
        finally:
            self._turn.acquire()


def run_ranks(size: int, work: Callable[[TensorGroup], T]) -> list[T]:
    """Return what `work` returns on each rank; raises what one of them raises first."""
    barrier, turn = threading.Barrier(size), threading.Lock()
    given: list[Tensor | None] = [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> T | None:
        try:
            with turn, torch.inference_mode():
                return work(ThreadGroup(rank, barrier, turn, given))
        except BaseException as error:
            failures.append(error)
            barrier.abort()
            return None

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(run, range(size)))
    if failures:
        raise failures[0]
    return results  # type: ignore[return-value]
