"""Copier: moves blocks between the tiers beside the steps, each direction on its own.

    submit ──► a lane for each direction: take all that is due ─► begin each ─► finish ─► report
               CPU: one memory copy a run of blocks, on the lane's thread (finish)
               CUDA: copies on the lane's stream (begin), an event behind them (finish)

Rules: a copy begins as soon as its lane comes to it, whatever the compute thread does, and is
reported once, when the bytes are in their place; one that raises is reported as failed, and the
next one goes on. Nothing is reported after `close`. `bandwidth` makes a lane as slow as a link that
carries so much: a copy is due when the last of its bytes would have come, and none of them comes
sooner, so that who looks too early sees it. That is waited for on a condition, which `close` ends.

Why no order between compute and copies is needed here. The scheduler plans a copy only when every
step that wrote its `src` was reported, when nothing in flight touches its `dst`, and it plans
nothing that reads `dst` or writes either before the copy was reported; steps in flight may read
`src`, which a copy out does as well. So all that is left to show is that what is reported is done:
- A step on a CPU is reported by the thread that computed it. On CUDA its StepDone is made behind
  its last event, or behind the end of the whole device where its launch failed: all it wrote is in
  memory, for every stream, since the event was waited for by the host. With lookahead a further
  step of the same request may be in flight; it is a step in flight, whose writes the scheduler
  knows. Padding in a captured graph writes no KV.
- A copy is reported behind its memory copy or behind its event, in the same way; what a stream
  is given after that comes after it.
The one writer of KV that no report speaks for is Poison, in tests: it takes back blocks of a
request that is forgotten. It waits for the device itself, under the lock that a copy takes first.

Must not know: scheduling, requests, steps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastserve.core.messages import Copy, CopyDirection
from fastserve.executor.block_checks import BlockChecks
from fastserve.executor.kv_store import KVStore

logger = logging.getLogger(__name__)

Report = Callable[[int, bool], None]
"""Is told the id of a copy, and whether it was done."""
Finish = Callable[[], None]


class Run(NamedTuple):
    """Blocks that lie side by side in both tiers: `count` of them from each of these places."""

    device: int
    chunk: int
    row: int
    num_blocks: int


def runs(copy: Copy, rows: int) -> Iterator[Run]:
    """Yield the runs of a copy, of which the host's chunks hold `rows` blocks each."""
    is_out = copy.direction is CopyDirection.SWAP_OUT
    devices, hosts = (copy.src, copy.dst) if is_out else (copy.dst, copy.src)
    begin = 0
    for end in range(1, len(devices) + 1):
        if (
            end == len(devices)
            or devices[end] != devices[end - 1] + 1
            or hosts[end] != hosts[end - 1] + 1
            or hosts[end] % rows == 0
        ):
            chunk, row = divmod(hosts[begin], rows)
            yield Run(devices[begin], chunk, row, end - begin)
            begin = end


class Mover(Protocol):
    """Carries a copy out."""

    def begin(self, copy: Copy) -> Finish:
        """Begin a copy; what is returned ends once the bytes are there."""

    def on(self, direction: CopyDirection) -> AbstractContextManager[object]:
        """Return where a direction's copies are ordered: what runs in it comes in line."""

    def close(self) -> None:
        """Wait until nothing moves."""


class CpuMover:
    """Copies by numpy: others run meanwhile, and no thread pool is started, as torch's would be."""

    def __init__(self, kv: KVStore) -> None:
        self._rows = kv.host.rows
        self._device = as_bytes(kv.device.tensor)
        self._chunks = [as_bytes(chunk) for chunk in kv.host.chunks]

    def begin(self, copy: Copy) -> Finish:
        return partial(self._move, copy)

    def on(self, direction: CopyDirection) -> AbstractContextManager[object]:
        return nullcontext()

    def close(self) -> None:
        pass

    def _move(self, copy: Copy) -> None:
        for run in runs(copy, self._rows):
            device = self._device[run.device : run.device + run.num_blocks]
            host = self._chunks[run.chunk][run.row : run.row + run.num_blocks]
            is_out = copy.direction is CopyDirection.SWAP_OUT
            source, target = (device, host) if is_out else (host, device)
            np.copyto(target, source)


class CudaMover:
    """Copies on a stream for each direction."""

    def __init__(self, kv: KVStore) -> None:
        self._kv = kv
        device = kv.device.tensor.device
        self._streams: dict[CopyDirection, torch.cuda.Stream] = {
            direction: torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for direction in CopyDirection
        }

    def begin(self, copy: Copy) -> Finish:
        host = self._kv.host
        stream = self._streams[copy.direction]
        with torch.cuda.stream(stream):
            for run in runs(copy, host.rows):
                on_device = self._kv.device.tensor[run.device : run.device + run.num_blocks]
                on_host = host.chunks[run.chunk][run.row : run.row + run.num_blocks]
                is_out = copy.direction is CopyDirection.SWAP_OUT
                source, target = (on_device, on_host) if is_out else (on_host, on_device)
                target.copy_(source, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(stream)
        finish: Finish = done.synchronize
        return finish

    def on(self, direction: CopyDirection) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._streams[direction])

    def close(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()


class Copier:
    """Moves blocks of one rank's KV; `bandwidth` is in bytes a second, each way."""

    def __init__(
        self, kv: KVStore, *, bandwidth: float | None = None, checks: BlockChecks | None = None
    ) -> None:
        self._mover: Mover = CudaMover(kv) if kv.device.tensor.is_cuda else CpuMover(kv)
        self._checks = checks
        block_s = 0.0 if bandwidth is None else kv.block_bytes / bandwidth
        self._lanes = {
            direction: Lane(f"fastserve-copy-{direction}", self._begin, block_s)
            for direction in CopyDirection
        }

    def begin(self, copy: Copy, report: Report) -> None:
        """Begin a copy and return at once; `report` is called on another thread."""
        self._lanes[copy.direction].put(copy, report)

    def close(self) -> None:
        """Stop; copies that were not reported by now never are, and nothing moves any more."""
        for lane in self._lanes.values():
            lane.close()
        self._mover.close()

    def _begin(self, copy: Copy) -> Finish:
        if self._checks is None:
            return self._mover.begin(copy)
        with self._mover.on(copy.direction):
            self._checks.leaving(copy)
        return partial(self._finish_checked, copy, self._mover.begin(copy), self._checks)

    def _finish_checked(self, copy: Copy, finish: Finish, checks: BlockChecks) -> None:
        finish()
        with self._mover.on(copy.direction):
            checks.arrived(copy)


class _Waiting(NamedTuple):
    copy: Copy
    report: Report
    due_at: float  # by the steady clock: no sooner may it begin


class Lane:
    """One direction: a thread that carries copies out in the order in which they came."""

    def __init__(self, name: str, begin: Callable[[Copy], Finish], block_s: float) -> None:
        """A block takes at least `block_s` seconds; the thread starts with the first copy."""
        self._begin = begin
        self._block_s = block_s
        self._link_free_at = 0.0
        self._changed = threading.Condition()
        self._waiting: deque[_Waiting] = deque()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def put(self, copy: Copy, report: Report) -> None:
        """Have a copy carried out."""
        with self._changed:
            if self._is_closed:
                return
            begins_at = max(self._link_free_at, time.monotonic())
            self._link_free_at = begins_at + self._block_s * len(copy.src)
            self._waiting.append(_Waiting(copy, report, self._link_free_at))
            self._changed.notify()
            if self._thread.ident is None:
                self._thread.start()

    def close(self) -> None:
        """Begin and report nothing more, and end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while batch := self._take():
            begun = [(waiting, self._try_begin(waiting.copy)) for waiting in batch]
            for waiting, finish in begun:
                if self._is_closed:
                    return
                is_done = _try(finish, waiting.copy)
                waiting.report(waiting.copy.copy_id, is_done)

    def _take(self) -> list[_Waiting]:
        """Wait until copies are due and return them all; none once closed."""
        with self._changed:
            while not self._is_closed:
                now = time.monotonic()
                batch: list[_Waiting] = []
                while self._waiting and self._waiting[0].due_at <= now:
                    batch.append(self._waiting.popleft())
                if batch:
                    return batch
                self._changed.wait(self._waiting[0].due_at - now if self._waiting else None)
            return []

    def _try_begin(self, copy: Copy) -> Finish:
        try:
            return self._begin(copy)
        except Exception as error:
            return partial(_raise, error)


def _try(finish: Finish, copy: Copy) -> bool:
    try:
        finish()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        logger.error(
            "a copy of %d KV blocks (%s) failed: %s", len(copy.src), copy.direction, reason
        )
        return False
    return True


def _raise(error: Exception) -> NoReturn:
    raise error


def as_bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """Return a host tensor of blocks as [num_blocks, block_bytes], over the same memory."""
    array: npt.NDArray[np.uint8] = tensor.view(len(tensor), -1).view(torch.uint8).numpy()
    return array
