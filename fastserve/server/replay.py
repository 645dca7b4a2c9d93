"""What streams have said, kept so that a client that lost its connection gets the rest.

Rules: the events of a stream are numbered from 1 and handed out in order, without a gap or a
repeat, to its latest reader alone. What that reader was not given is never dropped: where there is
no room for more, the writer waits. What it was given is kept while there is room, for it may not
have arrived. A stream without a reader is kept for the grace and no longer, whether it has ended or
not; where all streams together hold too much, those that have ended go first, longest alone first.
Must not know: asyncio, HTTP, what an event says, the time (callers name it).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

MAX_STREAM_BYTES = 2**20
MAX_STREAM_EVENTS = 8192
EVENT_OVERHEAD_BYTES = 48  # of a bytes object in a deque


class EventGoneError(LookupError):
    """The events after the one named are no longer all there."""


@dataclass(frozen=True, slots=True)
class ReplayLimits:
    """How long streams are kept without a reader, and how much of them is held."""

    grace_s: float
    max_bytes: int  # of all streams; each may have one event beyond
    max_stream_bytes: int = MAX_STREAM_BYTES  # of one; one event beyond is let in
    max_stream_events: int = MAX_STREAM_EVENTS


class Replay:
    """The events of one stream that are held; the id of each is `name` and its number.

    `on_drop` is called when the stream is dropped: nobody will be given anything of it any more.
    """

    def __init__(self, name: str, on_drop: Callable[[], None]) -> None:
        self.name = name
        self.on_drop = on_drop
        self.is_ended = False  # no event will be added
        self.is_dropped = False
        self.reader = 1  # the latest one's number; those before it are given nothing more
        self.deadline: float | None = None  # when it is dropped; None while it has a reader
        self.num_bytes = 0
        self.num_unread = 0  # events that the reader was not given yet
        self.unread_bytes = 0
        self._events: deque[bytes] = deque()
        self._num_dropped = 0  # events that were here before the first one held

    @property
    def num_events(self) -> int:
        """Events that were ever added, which is also the number of the latest."""
        return self._num_dropped + len(self._events)

    def id_of(self, number: int) -> str:
        """Return the id of an event; of number 0, the id that stands before the first."""
        return f"{self.name}:{number}"

    def take(self) -> list[bytes]:
        """Give the reader all that it was not given yet."""
        events = self._latest(self.num_unread)
        self.num_unread = self.unread_bytes = 0
        return events

    def add(self, event: bytes) -> None:
        """Hold one event more."""
        stamped = f"id: {self.id_of(self.num_events + 1)}\n".encode() + event
        self._events.append(stamped)
        self.num_unread += 1
        self.unread_bytes += cost(stamped)
        self.num_bytes += cost(stamped)

    def rewind(self, number: int) -> None:
        """Let the reader go on after that event.

        Raises EventGoneError if one after it was dropped, ValueError if it has not been yet.
        """
        if not 0 <= number <= self.num_events:
            raise ValueError(f"there is no event {number} yet")
        if number < self._num_dropped:
            raise EventGoneError
        self.num_unread = self.num_events - number
        self.unread_bytes = sum(map(cost, self._latest(self.num_unread)))

    def _latest(self, num_events: int) -> list[bytes]:
        return [self._events[i] for i in range(-num_events, 0)]

    def is_above(self, limits: ReplayLimits) -> bool:
        """Whether it holds more than one stream is to hold."""
        return (
            self.num_bytes > limits.max_stream_bytes or len(self._events) > limits.max_stream_events
        )

    def drop_oldest(self) -> int:
        """Drop the oldest event if the reader was given it; return the bytes that this frees."""
        if self.num_unread == len(self._events):
            return 0
        freed = cost(self._events.popleft())
        self._num_dropped += 1
        self.num_bytes -= freed
        return freed


class Replays:
    """What all streams hold together, and which of them have no reader."""

    def __init__(self, limits: ReplayLimits) -> None:
        self.limits = limits
        self.num_bytes = 0
        # Without a reader, by name, longest alone first: the grace is the same for all.
        self._alone: dict[str, Replay] = {}
        self._ended_alone: dict[str, Replay] = {}

    def has_room(self, replay: Replay) -> bool:
        """Whether an event may be added; where not, it can once the reader takes what there is."""
        limits = self.limits
        return not replay.num_unread or (
            replay.num_unread < limits.max_stream_events
            and replay.unread_bytes < limits.max_stream_bytes
            and self.num_bytes < limits.max_bytes
        )

    def add(self, replay: Replay, event: bytes) -> None:
        """Add an event to a stream, and make room for it."""
        before = replay.num_bytes
        replay.add(event)
        self.num_bytes += replay.num_bytes - before
        while replay.is_above(self.limits) and (freed := replay.drop_oldest()):
            self.num_bytes -= freed
        while self.num_bytes > self.limits.max_bytes and self._ended_alone:
            self._drop(next(iter(self._ended_alone.values())))
        while self.num_bytes > self.limits.max_bytes and (freed := replay.drop_oldest()):
            self.num_bytes -= freed

    def end(self, replay: Replay) -> None:
        """Take note that a stream is complete."""
        replay.is_ended = True
        if replay.name in self._alone:
            self._ended_alone[replay.name] = replay

    def resume(self, replay: Replay, number: int) -> int:
        """Give a stream a new reader, who has what came up to that event; return its number.

        Raises as `Replay.rewind` does, and then nothing has changed.
        """
        replay.rewind(number)
        replay.reader += 1
        replay.deadline = None
        self._alone.pop(replay.name, None)
        self._ended_alone.pop(replay.name, None)
        return replay.reader

    def leave(self, replay: Replay, reader: int, now: float) -> float | None:
        """Take note that a reader is gone; return when the stream is dropped unless one comes.

        None where another reader has come already.
        """
        if replay.reader != reader:
            return None
        replay.deadline = now + self.limits.grace_s
        self._alone[replay.name] = replay
        if replay.is_ended:
            self._ended_alone[replay.name] = replay
        return replay.deadline

    def expire(self, now: float) -> None:
        """Drop the streams whose deadline has come."""
        while self._alone:
            replay = next(iter(self._alone.values()))
            if replay.deadline is None or replay.deadline > now:
                return
            self._drop(replay)

    def _drop(self, replay: Replay) -> None:
        replay.is_dropped = True
        del self._alone[replay.name]
        self._ended_alone.pop(replay.name, None)
        self.num_bytes -= replay.num_bytes
        replay.on_drop()


def cost(event: bytes) -> int:
    """Return the bytes of memory that an event takes."""
    return len(event) + EVENT_OVERHEAD_BYTES
