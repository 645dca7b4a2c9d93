"""The copier: what moves, what is reported and when, and how it ends."""

from __future__ import annotations

import itertools
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.messages import Copy, CopyDirection
from fastserve.executor import kv_store
from fastserve.executor.block_checks import BlockChecks
from fastserve.executor.copier import Copier, Lane, Run, runs
from fastserve.executor.facts import BlockCounts
from fastserve.executor.kv_store import KVShape, KVStore

OUT, IN = CopyDirection.SWAP_OUT, CopyDirection.SWAP_IN
SHAPE = KVShape(num_layers=2, num_kv_heads=1, head_dim=4)
BLOCK_SIZE = 2
ROWS = 5  # blocks in a chunk of the host
PATIENCE_S = 60.0
ENDLESS = 1e-6  # bytes a second: no copy ends in anybody's lifetime


def make_store(
    num_device: int = 16, num_host: int = 13, device: str = "cpu", dtype=torch.float32
) -> KVStore:
    """Return KV whose every block is another number, those on the host negative."""
    kv = KVStore(
        SHAPE,
        BlockCounts(num_device, num_host),
        block_size=BLOCK_SIZE,
        dtype=dtype,
        device=torch.device(device),
    )
    for block_id in range(num_device):
        kv.device.tensor[block_id] = block_id + 1
    for block_id in range(num_host):
        kv.host[block_id].fill_(-block_id - 1)
    return kv


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the host's blocks lie in several chunks."""
    block_bytes = SHAPE.block_bytes(BLOCK_SIZE, torch.float32)
    monkeypatch.setattr(kv_store, "CHUNK_BYTES", block_bytes * ROWS)


class Ends:
    """Collects what a copier reports."""

    def __init__(self) -> None:
        self._ends: queue.SimpleQueue[tuple[int, bool]] = queue.SimpleQueue()

    def __call__(self, copy_id: int, is_done: bool) -> None:
        self._ends.put((copy_id, is_done))

    def next(self) -> tuple[int, bool]:
        """Wait for the next one."""
        return self._ends.get(timeout=PATIENCE_S)

    @property
    def is_empty(self) -> bool:
        """Whether there is none."""
        return self._ends.empty()


@pytest.fixture
def make_copier() -> Iterator[Callable[..., Copier]]:
    """Make copiers, and close them after the test."""
    made: list[Copier] = []

    def make(*args, **kwargs) -> Copier:
        made.append(Copier(*args, **kwargs))
        return made[-1]

    yield make
    for copier in made:
        copier.close()


def numbers(kv: KVStore) -> tuple[list[float], list[float]]:
    """Return the number of each block of both tiers; one that is torn has none."""
    tiers = (kv.device.tensor, torch.cat(kv.host.chunks))
    lists = []
    for tier in tiers:
        flat = tier.flatten(1).float().cpu()
        assert bool((flat == flat[:, :1]).all()), "a block is torn"
        lists.append(flat[:, 0].tolist())
    return lists[0], lists[1]


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────


@given(
    ids=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=20),
    direction=st.sampled_from(CopyDirection),
    rows=st.integers(1, 8),
)
def test_runs_are_the_copy_in_fewest_pieces(
    ids: list[tuple[int, int]], direction: CopyDirection, rows: int
) -> None:
    """Every block once and in order, no run across chunks, and none that the next continues."""
    src, dst = tuple(pair[0] for pair in ids), tuple(pair[1] for pair in ids)
    found = list(runs(Copy(0, direction, src, dst), rows))
    pairs = [
        (run.device + index, run.chunk * rows + run.row + index)
        for run in found
        for index in range(run.num_blocks)
    ]
    assert pairs == (ids if direction is OUT else [(host, device) for device, host in ids])
    assert all(run.num_blocks >= 1 and run.row + run.num_blocks <= rows for run in found)
    for first, second in itertools.pairwise(found):
        follows = Run(
            first.device + first.num_blocks,
            first.chunk,
            first.row + first.num_blocks,
            second.num_blocks,
        )
        assert second != follows


# ── copies ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_go_where_they_are_sent_and_nothing_else_changes(
    make_copier: Callable[..., Copier], dtype: torch.dtype
) -> None:
    """Out and back, over chunks, in runs and single blocks."""
    kv, ends = make_store(dtype=dtype), Ends()
    copier = make_copier(kv)
    device, host = numbers(kv)
    for copy in (
        Copy(0, OUT, (3, 4, 5, 6, 9, 1), (3, 4, 5, 6, 12, 0)),
        Copy(1, IN, (12, 4, 5, 1), (7, 8, 2, 15)),
        Copy(2, OUT, (0,), (11,)),
    ):
        copier.begin(copy, ends)
        assert ends.next() == (copy.copy_id, True)
        source, target = (device, host) if copy.direction is OUT else (host, device)
        for src, dst in zip(copy.src, copy.dst, strict=True):
            target[dst] = source[src]
        assert numbers(kv) == (device, host)


def test_a_copy_that_fails_is_reported_and_the_next_goes_on(
    make_copier: Callable[..., Copier], caplog: pytest.LogCaptureFixture
) -> None:
    """It is one line in the log, whichever place does not exist."""
    kv, ends = make_store(), Ends()
    copier = make_copier(kv)
    for copy in (Copy(4, OUT, (0,), (99,)), Copy(5, OUT, (16,), (0,)), Copy(6, OUT, (2,), (3,))):
        copier.begin(copy, ends)
    assert [ends.next() for _ in range(3)] == [(4, False), (5, False), (6, True)]
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert caplog.messages[0].startswith("a copy of 1 KV blocks (out) failed: ")
    assert numbers(kv)[1][3] == 3.0


def test_many_copies_in_both_directions_keep_every_block(
    make_copier: Callable[..., Copier],
) -> None:
    """Ten thousand moves, each begun once what it needs was reported: no checksum differs."""
    kv, ends, rng = make_store(24, 17), Ends(), random.Random(11)
    checks = BlockChecks(kv)
    copier = make_copier(kv, checks=checks)
    # Where each number lies that moves about: first 16 on the device, with eight places free.
    lying = {OUT: {place: place + 1.0 for place in range(16)}, IN: dict[int, float]()}
    free = {OUT: set(range(17)), IN: set(range(16, 24))}  # where each direction may copy to
    flying: dict[int, tuple[Copy, list[float]]] = {}

    def land() -> None:
        copy_id, is_done = ends.next()
        assert is_done
        copy, moving = flying.pop(copy_id)
        back = IN if copy.direction is OUT else OUT
        lying[back].update(zip(copy.dst, moving, strict=True))
        free[back] |= set(copy.src)

    for copy_id in itertools.count():
        if checks.num_moves >= 10_000:
            break
        way = rng.choice((OUT, IN))
        count = min(rng.randrange(1, 6), len(free[way]), len(lying[way]))
        if count:
            src = tuple(rng.sample(sorted(lying[way]), count))
            dst = tuple(rng.sample(sorted(free[way]), count))
            free[way] -= set(dst)
            copy = Copy(copy_id, way, src, dst)
            flying[copy_id] = copy, [lying[way].pop(place) for place in src]
            copier.begin(copy, ends)
        while len(flying) > 4 or (flying and not (count and ends.is_empty)):
            land()
    while flying:
        land()
    for way, found in zip((OUT, IN), numbers(kv), strict=True):
        assert {place: found[place] for place in lying[way]} == lying[way]
    assert sorted([*lying[OUT].values(), *lying[IN].values()]) == [i + 1.0 for i in range(16)]
    assert checks.num_mismatches == 0


def test_a_copier_that_moves_nothing_has_no_threads() -> None:
    """Most engines never swap."""
    before = threading.active_count()
    copier = Copier(make_store())
    assert threading.active_count() == before
    copier.close()


# ── pace and end ─────────────────────────────────────────────────────────────────────────────────


def test_a_slow_link_takes_its_time(make_copier: Callable[..., Copier]) -> None:
    """A copy is not done before so many bytes could have gone over, those before it included."""
    kv, ends = make_store(), Ends()
    copier = make_copier(kv, bandwidth=kv.block_bytes / 0.01)
    begun = time.monotonic()
    copier.begin(Copy(0, OUT, (1, 2, 3), (0, 1, 2)), ends)
    copier.begin(Copy(1, OUT, (4, 5), (3, 4)), ends)
    assert ends.next() == (0, True)
    assert time.monotonic() - begun >= 0.03
    assert ends.next() == (1, True)
    assert time.monotonic() - begun >= 0.05


def test_an_idle_link_saves_nothing_up(make_copier: Callable[..., Copier]) -> None:
    """A copy after a pause takes as long as the first."""
    kv, ends = make_store(), Ends()
    copier = make_copier(kv, bandwidth=kv.block_bytes / 0.02)
    copier.begin(Copy(0, OUT, (1,), (0,)), ends)
    ends.next()
    begun = time.monotonic()
    copier.begin(Copy(1, OUT, (1,), (0,)), ends)
    ends.next()
    assert time.monotonic() - begun >= 0.02


def test_each_direction_has_a_pace_of_its_own() -> None:
    """What goes back does not wait for what goes out."""
    gate, ends = threading.Event(), Ends()

    def wait() -> None:
        gate.wait(PATIENCE_S)

    def begin(copy: Copy) -> Callable[[], None]:
        return wait if copy.direction is OUT else lambda: None

    kv = make_store()
    copier = Copier(kv)
    copier._lanes = {way: Lane(f"test-{way}", begin, 0.0) for way in CopyDirection}
    copier.begin(Copy(0, OUT, (1,), (0,)), ends)
    copier.begin(Copy(1, IN, (1,), (0,)), ends)
    assert ends.next() == (1, True)
    gate.set()
    assert ends.next() == (0, True)
    copier.close()


def test_close_ends_a_pace(make_copier: Callable[..., Copier]) -> None:
    """At once, whatever the link still owes: nothing is reported, and no byte came too soon."""
    kv, ends = make_store(), Ends()
    before = numbers(kv)
    copier = make_copier(kv, bandwidth=ENDLESS)
    begun = time.monotonic()
    for copy_id, direction in enumerate((OUT, IN, OUT)):
        copier.begin(Copy(copy_id, direction, (1,), (0,)), ends)
    copier.close()
    copier.begin(Copy(3, OUT, (2,), (5,)), ends)
    copier.close()
    assert time.monotonic() - begun < PATIENCE_S
    assert ends.is_empty
    assert numbers(kv) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastserve-c")]


def test_a_pace_waits_without_a_busy_core(make_copier: Callable[..., Copier]) -> None:
    """A link of so many seconds costs none of a processor."""
    kv, ends = make_store(), Ends()
    copier = make_copier(kv, bandwidth=kv.block_bytes / 0.3)
    begun = time.process_time()
    copier.begin(Copy(0, OUT, (1,), (0,)), ends)
    ends.next()
    assert time.process_time() - begun < 0.15


# ── CUDA ─────────────────────────────────────────────────────────────────────────────────────────


def spin(seconds: float) -> None:
    """Keep the compute stream busy; a cycle is at least half a nanosecond."""
    torch.cuda._sleep(int(seconds * 2e9))


@pytest.mark.gpu
def test_copies_run_beside_a_busy_device(make_copier: Callable[..., Copier]) -> None:
    """They are done before a step that began earlier is."""
    kv, ends = make_store(device="cuda"), Ends()
    torch.cuda.synchronize()
    copier = make_copier(kv)
    spin(1.0)
    step = torch.cuda.Event()
    step.record()
    copier.begin(Copy(0, OUT, (1, 2, 5), (0, 1, 7)), ends)
    copier.begin(Copy(1, IN, (3, 4), (8, 9)), ends)
    assert {ends.next(), ends.next()} == {(0, True), (1, True)}
    assert not step.query()
    step.synchronize()
    device, host = numbers(kv)
    assert [host[0], host[1], host[7], device[8], device[9]] == [2, 3, 6, -4, -5]


@pytest.mark.gpu
def test_a_copy_planned_behind_a_reported_step_has_what_it_wrote(
    make_copier: Callable[..., Copier],
) -> None:
    """And a step that is launched behind a reported copy reads what that brought."""
    kv, ends = make_store(device="cuda"), Ends()
    copier = make_copier(kv)
    for round_number in range(50):
        spin(0.002)
        kv.device.tensor[2] = 100.0 + round_number
        step = torch.cuda.Event(blocking=True)
        step.record()
        step.synchronize()  # the step is reported
        copier.begin(Copy(0, OUT, (2,), (6,)), ends)
        assert ends.next() == (0, True)
        assert bool((kv.host[6] == 100.0 + round_number).all())
        copier.begin(Copy(1, IN, (6,), (3,)), ends)
        assert ends.next() == (1, True)
        assert bool((kv.device.tensor[3] == 100.0 + round_number).all())


@pytest.mark.gpu
def test_close_waits_for_what_moves(make_copier: Callable[..., Copier]) -> None:
    """Memory that a copy still writes to must not be given to others."""
    kv = make_store(4000, 4000, device="cuda")
    copier = make_copier(kv)
    copier.begin(Copy(0, OUT, tuple(range(4000)), tuple(range(4000))), lambda *end: None)
    begun = time.monotonic()
    copier.close()
    assert time.monotonic() - begun < math.inf
    assert all(stream.query() for stream in copier._mover._streams.values())  # type: ignore[attr-defined]
