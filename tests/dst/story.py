"""The story of a run: what happened, when, and to which request.

Rules: a line is about one request, or about all of them. Same seed, same lines, same hash, on any
machine: times are exact in the hash and rounded for people. Must not know: what should happen.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from fastserve.sim.clock import VirtualClock

ALL = -1


class Line(NamedTuple):
    """What happened to a request, or to ALL."""

    at: float
    number: int
    text: str

    def __str__(self) -> str:
        who = "" if self.number == ALL else f"request {self.number} "
        return f"{self.at:12.4f} s  {who}{self.text}"


class Story:
    """Written as time passes."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._lines: list[Line] = []

    def tell(self, text: str, number: int = ALL) -> None:
        """Add a line."""
        self._lines.append(Line(self._clock.time, number, text))

    def of(self, number: int) -> str:
        """Return what happened to a request, and to all while it was there."""
        own = [index for index, line in enumerate(self._lines) if line.number == number]
        if not own:
            return ""
        lines = self._lines[own[0] :]
        return "\n".join(str(line) for line in lines if line.number in (number, ALL))

    def end(self, num_lines: int = 40) -> str:
        """Return the last lines, whomever they are about."""
        return "\n".join(map(str, self._lines[-num_lines:]))

    @property
    def sha256(self) -> str:
        """The hash of all lines."""
        told = hashlib.sha256()
        for at, number, text in self._lines:
            told.update(f"{at.hex()} {number} {text}\n".encode())
        return told.hexdigest()
