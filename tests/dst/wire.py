"""The wire between the two ends of an engine's socket, in virtual time.

Rules: what is sent are the frames that a live socket carries; they arrive in order, each some time
later. Must not know: what a message means.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from math import inf

from fastserve.sim.clock import VirtualClock
from fastserve.wire.engine_messages import Command, Event, decode_command
from fastserve.wire.frames import encode_frame
from tests.framing import payload_of


class Wire:
    """Frames on their way in one direction, each up to `longest_s`."""

    def __init__(self, clock: VirtualClock, rng: random.Random, longest_s: float) -> None:
        self._clock = clock
        self._rng = rng
        self._longest_s = longest_s
        self._frames: deque[tuple[float, bytes]] = deque()

    def send(self, frame: bytes) -> None:
        """Send one frame."""
        at = self._clock.time + self._rng.random() * self._longest_s
        if self._frames:
            at = max(at, self._frames[-1][0])
        self._frames.append((at, frame))

    @property
    def next_at(self) -> float:
        """When the next one arrives; inf: none is under way."""
        return self._frames[0][0] if self._frames else inf

    def arrived(self) -> list[bytes]:
        """Take out the payloads of those that have arrived."""
        payloads = []
        while self._frames and self._frames[0][0] <= self._clock.time:
            payloads.append(payload_of(self._frames.popleft()[1]))
        return payloads

    def cut(self) -> int:
        """Lose all from some frame on, as when the sender is killed; return how many those are."""
        num_kept = self._rng.randint(0, len(self._frames))
        num_lost = len(self._frames) - num_kept
        for _ in range(num_lost):
            self._frames.pop()
        return num_lost


class Inbox:
    """What a `Loop` reads commands from; the other end never leaves."""

    is_closed = False

    def __init__(self, wire: Wire) -> None:
        self.on_arrival: Callable[[], None] = lambda: None
        self._wire = wire

    def drain(self) -> list[Command]:
        """Return the commands that have arrived."""
        return [decode_command(payload) for payload in self._wire.arrived()]


class Outbox:
    """What a `Loop` says events to."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def send(self, event: Event) -> None:
        """Send one event."""
        self._wire.send(encode_frame(event))
