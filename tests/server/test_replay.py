"""What is kept of streams: nothing unread is lost, nothing is given twice, nothing outstays."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fastserve.server.replay import EventGoneError, Replay, ReplayLimits, Replays, cost

GRACE_S = 10.0
LIMITS = ReplayLimits(GRACE_S, max_bytes=2000, max_stream_bytes=700, max_stream_events=6)
MAX_SIZE = 150  # of an event, before its id


@dataclass(eq=False)
class Watched:
    """A stream, and all that was ever said on it."""

    replay: Replay
    said: list[bytes] = field(default_factory=list)
    num_given: int = 0  # up to which event the reader has them
    has_reader: bool = True
    left_at: float = 0.0


class StreamsInAnyOrder(RuleBasedStateMachine):
    """Streams are written, read, left, resumed and forgotten; a list of all that was said knows."""

    def __init__(self) -> None:
        super().__init__()
        self.replays = Replays(LIMITS)
        self.now = 0.0
        self.streams: list[Watched] = []
        self.num_opened = 0

    def one(self, index: int) -> Watched | None:
        """Choose a stream that is kept."""
        return self.streams[index % len(self.streams)] if self.streams else None

    @rule()
    def open(self) -> None:
        """A stream begins."""
        watched = Watched(Replay(f"s{self.num_opened}", lambda: self.dropped(watched)))
        self.num_opened += 1
        self.streams.append(watched)

    def dropped(self, watched: Watched) -> None:
        """It is forgotten: for its deadline, or, where all hold too much, since it has ended."""
        assert not watched.has_reader
        is_due = watched.left_at + GRACE_S <= self.now
        assert is_due or watched.replay.is_ended
        self.streams.remove(watched)

    @rule(index=st.integers(0, 20), size=st.integers(0, MAX_SIZE), count=st.integers(1, 9))
    def write(self, index: int, size: int, count: int) -> None:
        """Something is said, as far as there is room."""
        for _ in range(count):
            watched = self.one(index)
            if watched is None or watched.replay.is_ended:
                return
            if not self.replays.has_room(watched.replay):
                assert watched.num_given < len(watched.said)  # reading makes room
                return
            event = b"data: " + b"x" * size + b"\n\n"
            watched.said.append(
                b"id: %s:%d\n" % (watched.replay.name.encode(), 1 + len(watched.said)) + event
            )
            self.replays.add(watched.replay, event)

    @rule(index=st.integers(0, 20))
    def end(self, index: int) -> None:
        """Its last word was said."""
        if watched := self.one(index):
            self.replays.end(watched.replay)

    @rule(index=st.integers(0, 20))
    def read(self, index: int) -> None:
        """The reader is given what it has not got, and then there is room."""
        watched = self.one(index)
        if watched is not None and watched.has_reader:
            assert watched.replay.take() == watched.said[watched.num_given :]
            watched.num_given = len(watched.said)
            assert self.replays.has_room(watched.replay)

    @rule(index=st.integers(0, 20))
    def leave(self, index: int) -> None:
        """The connection is lost."""
        watched = self.one(index)
        if watched is not None and watched.has_reader:
            watched.has_reader, watched.left_at = False, self.now
            deadline = self.replays.leave(watched.replay, watched.replay.reader, self.now)
            assert deadline == self.now + GRACE_S

    @rule(index=st.integers(0, 20), back=st.integers(-1, 9))
    def resume(self, index: int, back: int) -> None:
        """A client comes back; the reader before it, if there still is one, is given no more."""
        watched = self.one(index)
        if watched is None:
            return
        number = watched.num_given - back
        earlier, num_held = watched.replay.reader, watched.replay.num_bytes
        if not 0 <= number <= len(watched.said):
            with pytest.raises(ValueError, match="there is no event"):
                self.replays.resume(watched.replay, number)
            return
        try:
            assert self.replays.resume(watched.replay, number) > earlier
        except EventGoneError:
            rest = watched.said[number:]
            assert number < watched.num_given
            assert sum(map(cost, rest)) > num_held
            return
        watched.num_given, watched.has_reader = number, True
        assert self.replays.leave(watched.replay, earlier, self.now) is None

    @rule(seconds=st.floats(0, 2 * GRACE_S))
    def wait(self, seconds: float) -> None:
        """Time passes, and takes what is due."""
        self.now += seconds
        self.replays.expire(self.now)
        for watched in self.streams:
            assert watched.has_reader or watched.left_at + GRACE_S > self.now

    @invariant()
    def nothing_holds_too_much(self) -> None:
        """Each stream within its bounds, all within theirs, but for one event each."""
        one_event = cost(b"id: s1000:1000\ndata: \n\n") + MAX_SIZE
        held = [watched.replay.num_bytes for watched in self.streams]
        assert self.replays.num_bytes == sum(held)
        assert self.replays.num_bytes <= LIMITS.max_bytes + len(held) * one_event
        assert all(num_bytes <= LIMITS.max_stream_bytes + one_event for num_bytes in held)
        assert all(not watched.replay.is_dropped for watched in self.streams)


TestStreamsInAnyOrder = StreamsInAnyOrder.TestCase


def filled(replays: Replays, name: str, num_events: int, dropped: list[str]) -> Replay:
    """Return a stream on which so many events of 100 bytes were said and read."""
    replay = Replay(name, lambda: dropped.append(name))
    for _ in range(num_events):
        replays.add(replay, b"x" * 100)
        replay.take()
    return replay


def test_what_was_given_goes_first_and_only_that():
    """Six events are held; of ten given ones the last six are; unread ones stop the writer."""
    replays = Replays(LIMITS)
    replay = filled(replays, "a", 10, [])
    with pytest.raises(EventGoneError):
        replays.resume(replay, 5)
    replays.resume(replay, 6)
    assert [event.partition(b"\n")[0] for event in replay.take()] == [
        b"id: a:7", b"id: a:8", b"id: a:9", b"id: a:10",
    ]  # fmt: skip
    for _ in range(20):
        if replays.has_room(replay):
            replays.add(replay, b"y" * 100)
    assert replay.num_unread == 5  # 700 bytes and what was begun below them
    assert not replays.has_room(replay)
    assert len(replay.take()) == 5
    assert replays.has_room(replay)


def test_ended_streams_make_room_longest_alone_first():
    """Those that run keep their grace, and those with a reader keep all."""
    replays = Replays(LIMITS)
    dropped: list[str] = []
    running = filled(replays, "running", 4, dropped)
    first, second = (filled(replays, name, 4, dropped) for name in ("first", "second"))
    for now, replay in enumerate((running, second, first)):
        replays.leave(replay, replay.reader, float(now))
    replays.end(first)
    replays.end(second)
    assert not dropped
    filled(replays, "new", 4, dropped)
    assert dropped == ["first"]  # it ended first; the second one is still within the bound
    assert running.num_bytes > 0
    replays.expire(GRACE_S)
    assert dropped == ["first", "running"]


def test_an_ended_stream_with_a_reader_stays():
    """Whether it ended while it had one, or one came back to it; once alone again it may go."""
    replays = Replays(LIMITS)
    dropped: list[str] = []
    resumed, read = (filled(replays, name, 4, dropped) for name in ("resumed", "read"))
    replays.leave(resumed, resumed.reader, 0.0)
    for replay in (resumed, read):
        replays.end(replay)
    reader = replays.resume(resumed, 4)
    filled(replays, "new", 6, dropped)
    replays.expire(2 * GRACE_S)
    assert not dropped
    replays.leave(read, read.reader, 0.0)
    replays.leave(resumed, reader, 0.0)
    filled(replays, "newer", 6, dropped)
    assert dropped == ["read"]


def test_a_full_house_lets_a_lone_reader_on():
    """What others hold unread cannot stop a stream whose reader takes what it is given."""
    replays = Replays(ReplayLimits(GRACE_S, max_bytes=500))
    greedy = Replay("greedy", lambda: None)
    while replays.has_room(greedy):
        replays.add(greedy, b"x" * 100)
    served = Replay("served", lambda: None)
    for number in range(1, 20):
        assert replays.has_room(served)
        replays.add(served, b"y" * 100)
        assert len(served.take()) == 1
        assert served.num_events == number
    assert replays.num_bytes <= 500 + 2 * cost(b"id: greedy:10\n" + b"x" * 100)
