"""What copies are measured to take."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch

from fastserve.executor import copy_times
from fastserve.executor.copy_times import CopyTimes, measure_copies
from fastserve.executor.facts import BlockCounts
from fastserve.executor.kv_store import KVShape, KVStore

NUM_BYTES = 2 * 2 * 16 * 2 * 64 * 4


def make_store(num_device: int, num_host: int) -> KVStore:
    """Return KV of 32 KiB a block, whose first blocks on the device are numbers."""
    kv = KVStore(
        KVShape(2, 2, 64),
        BlockCounts(num_device, num_host),
        block_size=16,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    kv.device.tensor[:].normal_()
    return kv


@pytest.mark.parametrize(("num_device", "num_host"), [(200, 300), (300, 200), (2, 9), (1, 1)])
def test_times_are_positive_and_blocks_keep_what_they_had(num_device: int, num_host: int) -> None:
    """Whichever tier is the smaller one; no thread stays."""
    kv = make_store(num_device, num_host)
    before, threads = kv.device.tensor.clone(), threading.active_count()
    begun = time.perf_counter()
    times = measure_copies(kv, None)
    taken = time.perf_counter() - begun
    assert 0.0 <= times.base_s < taken
    assert 0.0 < times.base_s + times.block_s < taken
    assert torch.equal(kv.device.tensor, before)
    assert threading.active_count() == threads


def test_a_paced_link_is_as_slow_as_it_says() -> None:
    """It is not waited for: a block takes what its bytes do, and a slower memory counts."""
    kv = make_store(8, 8)
    assert kv.block_bytes == NUM_BYTES
    begun = time.perf_counter()
    assert measure_copies(kv, 1.0).block_s == NUM_BYTES
    assert time.perf_counter() - begun < 60.0
    assert measure_copies(kv, 1e30).block_s < 1.0


def test_the_price_of_a_copy_is_told_from_that_of_its_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two sizes, the slower way; a block is what more blocks take more."""
    asked: list[range] = []

    def fake(copier: object, first: int, num_blocks: int) -> float:
        asked.append(range(first, first + num_blocks))
        return 0.5 + 0.25 * num_blocks

    monkeypatch.setattr(copy_times, "_round_trip_s", fake)
    assert measure_copies(make_store(50, 60), None) == CopyTimes(0.5, 0.25)
    assert asked[0] == range(50)
    assert {len(places) for places in asked[1:]} == {1, 6}
    assert max(places.stop for places in asked) == 50
    # What was copied a moment ago may be in a cache still.
    assert all(a.start != b.start for a, b in itertools.pairwise(asked[1:]))
