"""The driver's end of a rank: what it takes for the end of one, and what it says of that."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from fastserve.executor import rank_link
from fastserve.executor.rank_link import RankLink, RankLostError
from fastserve.settings.option import ConfigError
from fastserve.wire.frames import encode_frame, read_frame
from fastserve.wire.rank_messages import (
    Allocated,
    Beat,
    Leave,
    Loaded,
    Place,
    RankFailed,
    Report,
    Touch,
    decode_order,
)

LOADED = Loaded(
    block_bytes=1, cpu_kernels="torch", num_threads=1, num_device_blocks=1, num_host_blocks=0
)


class ThreadRank:
    """Fits `StartedRank`: the test itself is at the other end."""

    def __init__(self) -> None:
        self.connection, self.theirs = socket.socketpair()
        self.place = Place(host="thathost", local_rank=0, num_local_ranks=1)
        self.is_killed = threading.Event()

    def kill(self) -> None:
        self.is_killed.set()
        self.theirs.close()

    def end(self) -> str:
        return "killed by signal 9"

    def say(self, *reports: Report) -> None:
        """Say something to the driver."""
        for report in reports:
            self.theirs.sendall(encode_frame(report))


class Heard:
    """Fits `Listener`: keeps what it was told."""

    def __init__(self) -> None:
        self.reports: queue.SimpleQueue[tuple[int, Report]] = queue.SimpleQueue()
        self.errors: queue.SimpleQueue[Exception] = queue.SimpleQueue()

    def heard(self, rank: int, report: Report) -> None:
        """Keep a report."""
        self.reports.put((rank, report))

    def lost(self, rank: int, error: Exception) -> None:
        """Keep the reason."""
        self.errors.put(error)


@pytest.fixture
def opened() -> Iterator[tuple[RankLink, ThreadRank, Heard]]:
    """Open a link with a rank that has loaded."""
    started, heard = ThreadRank(), Heard()
    link = RankLink(
        5, "stage 2 of 3, shard 1 of 2", lambda rank: started, lambda rank, place: Touch(7), heard
    )
    started.say(Beat(-1), LOADED)
    assert heard.reports.get(timeout=10) == (5, LOADED)
    yield link, started, heard
    link.hang_up(is_killed=True)
    link.join()


def test_the_greeting_comes_first_and_orders_follow(
    opened: tuple[RankLink, ThreadRank, Heard],
) -> None:
    """In the order in which they were sent; reports come back, heartbeats do not."""
    link, started, heard = opened
    link.send(encode_frame(Touch(8)))
    with started.theirs.makefile("rb") as stream:
        orders = [decode_order(read_frame(stream) or b"") for _ in range(2)]
    assert orders == [Touch(7), Touch(8)]
    started.say(Beat(3), Allocated())
    assert heard.reports.get(timeout=10) == (5, Allocated())
    assert heard.errors.empty()


def test_a_rank_is_told_to_leave_unless_it_is_killed(
    opened: tuple[RankLink, ThreadRank, Heard],
) -> None:
    """One of another host then knows that no other driver will come for it."""
    link, started, _ = opened
    link.hang_up(is_killed=False)
    stream = started.theirs.makefile("rb")
    orders = [decode_order(read_frame(stream) or b"") for _ in range(2)]
    assert orders == [Touch(7), Leave()]
    assert read_frame(stream) is None
    assert not started.is_killed.is_set()


def test_a_rank_that_dies_is_told_with_its_place_and_step(
    opened: tuple[RankLink, ThreadRank, Heard],
) -> None:
    """In one line: which one, where, at what, and when it was last heard."""
    _, started, heard = opened
    started.say(Beat(41))
    started.theirs.close()
    error = heard.errors.get(timeout=10)
    assert isinstance(error, RankLostError)
    assert str(error).startswith(
        "rank 5 (thathost, stage 2 of 3, shard 1 of 2) died (killed by signal 9) at step 41; "
        "last heard 0."
    )


def test_a_rank_that_is_silent_is_killed_and_told(
    opened: tuple[RankLink, ThreadRank, Heard], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heartbeats keep it alive, for as long as they come."""
    monkeypatch.setattr(rank_link, "SILENCE_S", 0.3)
    _, started, heard = opened
    started.say(LOADED)  # the limit is set when it has loaded
    for _ in range(5):
        assert not started.is_killed.wait(0.1)
        started.say(Beat(2))
    begun = time.monotonic()
    error = heard.errors.get(timeout=10)
    assert 0.2 < time.monotonic() - begun < 5.0
    assert "is silent at step 2; last heard 0.3 s ago" in str(error)
    assert started.is_killed.is_set()


def test_what_a_rank_says_of_its_failure_is_passed_on(
    opened: tuple[RankLink, ThreadRank, Heard],
) -> None:
    """With its name before it."""
    _, started, heard = opened
    started.say(RankFailed("MemoryError: no room"))
    assert "shard 1 of 2) failed: MemoryError: no room before its first step" in str(
        heard.errors.get(timeout=10)
    )


def test_a_misconfiguration_stays_one(opened: tuple[RankLink, ThreadRank, Heard]) -> None:
    """Its line is for the user, and needs no rank."""
    _, started, heard = opened
    started.say(RankFailed("no weights there", is_misconfiguration=True))
    error = heard.errors.get(timeout=10)
    assert isinstance(error, ConfigError)
    assert str(error) == "no weights there"


def test_that_another_rank_is_gone_is_told_late_or_never(
    opened: tuple[RankLink, ThreadRank, Heard], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one's own end says more; where nobody tells of it, this is better than nothing."""
    monkeypatch.setattr(rank_link, "PEER_GRACE_S", 0.2)
    link, started, heard = opened
    started.say(RankFailed("connection reset", is_of_peer=True))
    assert "failed: connection reset" in str(heard.errors.get(timeout=10))

    monkeypatch.setattr(rank_link, "PEER_GRACE_S", 60.0)
    second = ThreadRank()
    link = RankLink(0, "alone", lambda rank: second, lambda rank, place: Touch(7), heard)
    second.say(LOADED)
    heard.reports.get(timeout=10)
    second.say(RankFailed("connection reset", is_of_peer=True))
    link.hang_up(is_killed=True)
    link.join()
    assert heard.errors.empty()


@pytest.mark.parametrize("payload", [b"\xc1", encode_frame(Touch(1))[4:]])
def test_what_cannot_be_understood_ends_the_rank(
    opened: tuple[RankLink, ThreadRank, Heard], payload: bytes
) -> None:
    """No message at all, and one of the other direction."""
    _, started, heard = opened
    started.theirs.sendall(len(payload).to_bytes(4, "big") + payload)
    assert "cannot be understood" in str(heard.errors.get(timeout=10))


def test_an_order_that_cannot_be_sent_loses_the_rank(
    opened: tuple[RankLink, ThreadRank, Heard],
) -> None:
    """The driver hears of it as of any other end; nothing is raised where it was sent."""
    link, started, heard = opened
    started.theirs.close()
    heard.errors.get(timeout=10)
    link.send(encode_frame(Touch(8)))
    assert "takes no more orders" in str(heard.errors.get(timeout=10))


def test_a_rank_that_cannot_be_started_is_lost() -> None:
    """For the reason that its starter gave."""

    def refuse(rank: int) -> ThreadRank:
        raise OSError("no such host")

    heard = Heard()
    link = RankLink(1, "alone", refuse, lambda rank, place: Touch(7), heard)
    assert str(heard.errors.get(timeout=10)) == "no such host"
    link.hang_up(is_killed=True)
    link.join()
