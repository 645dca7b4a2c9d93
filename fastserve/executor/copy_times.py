"""Measures how long real copies between the tiers take.

Rules: well under a second, before the model serves and while no block is in use. Places are gone
through in turn, so that no copy finds in a cache what the last one left there; each block comes
back to where it was. Must not know: what becomes of the times.
"""

from __future__ import annotations

import queue
import statistics
import time
from typing import NamedTuple

from fastserve.core.messages import Copy, CopyDirection
from fastserve.executor.copier import Copier
from fastserve.executor.kv_store import KVStore

NUM_BYTES = 32 * 2**20
"""Of the first places of each tier, where there are so many: more than a core's caches hold."""
REPEATS = 8


class CopyTimes(NamedTuple):
    """Seconds of a copy: base_s + block_s · blocks; of the slower direction."""

    base_s: float
    block_s: float


NO_LINK = CopyTimes(0.0, 0.0)


def measure_copies(kv: KVStore, bandwidth: float | None) -> CopyTimes:
    """Measure copies of one block and of several, in both directions, to the first places.

    With a `bandwidth`, in bytes a second, blocks take at least what that says. Raises RuntimeError
    where a copy fails.
    """
    most = min(len(kv.device.tensor), kv.host.num_blocks)
    num_places = min(max(NUM_BYTES // kv.block_bytes, 2), most)
    several = max(num_places // REPEATS, min(2, num_places))
    copier = Copier(kv)
    try:
        _round_trip_s(copier, 0, num_places)  # maps the memory, starts the threads
        several_s, one_s = (
            statistics.median(
                _round_trip_s(copier, (index * several) % (num_places - count + 1), count)
                for index in range(REPEATS)
            )
            for count in (several, 1)
        )
    finally:
        copier.close()
    block_s = max(several_s - one_s, 0.0) / (several - 1) if several > 1 else one_s
    paced_s = 0.0 if bandwidth is None else kv.block_bytes / bandwidth
    return CopyTimes(max(one_s - block_s, 0.0), max(block_s, paced_s))


def _round_trip_s(copier: Copier, first: int, num_blocks: int) -> float:
    """Copy blocks out and back; return the seconds of the slower way."""
    places = tuple(range(first, first + num_blocks))
    return max(
        _copy_s(copier, Copy(0, direction, places, places))
        for direction in (CopyDirection.SWAP_OUT, CopyDirection.SWAP_IN)
    )


def _copy_s(copier: Copier, copy: Copy) -> float:
    ends: queue.SimpleQueue[bool] = queue.SimpleQueue()
    begun = time.perf_counter()
    copier.begin(copy, lambda copy_id, is_done: ends.put(is_done))
    is_done = ends.get()
    seconds = time.perf_counter() - begun
    if not is_done:
        raise RuntimeError("KV cannot be copied to the host and back")
    return seconds
