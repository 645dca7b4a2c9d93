"""RankLink: the driver's end of the connection with one rank, from its start to its end.

Rules: a thread of its own starts the rank, hears it, and waits for its end, so that a child whose
life is tied to the thread that started it lives as long as it is heard. A rank is lost when its
connection ends, when it says that it has failed, or when it says nothing for too long; that is told
in one line that names the rank, its host, its place in the layout, the step it was at and when it
was last heard. That another rank is gone is told only if nobody tells of that one's own end.
Must not know: plans, what a report means.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from fastserve.executor.starting import StartedRank
from fastserve.settings.option import ConfigError
from fastserve.wire.frames import encode_frame, read_frame
from fastserve.wire.rank_messages import (
    NOT_STARTED,
    Beat,
    Leave,
    Loaded,
    Place,
    RankFailed,
    Report,
    StepEnded,
    decode_report,
)

logger = logging.getLogger(__name__)

SILENCE_S = 4.5
"""A rank that says nothing for so long is given up."""
LOADING_SILENCE_S = 60.0
"""The same while it imports and loads, when long calls may keep its heartbeats waiting."""
PEER_GRACE_S = 1.0
"""How long a rank that lost another waits for that one's own end to be told."""


class RankLostError(RuntimeError):
    """A rank can carry out no more plans; one line says which one, and why."""


class Listener(Protocol):
    """Who a link tells; its methods are called on the link's thread."""

    def heard(self, rank: int, report: Report) -> None:
        """Hear what a rank reports, but for heartbeats and failures."""

    def lost(self, rank: int, error: Exception) -> None:
        """Hear that a rank is over: ConfigError where settings cannot be honoured."""


class RankLink:
    """One rank; `describe` says in words where it is in the layout."""

    def __init__(
        self,
        rank: int,
        description: str,
        start: Callable[[int], StartedRank],
        greeting: Callable[[int, Place], msgspec.Struct],
        listener: Listener,
    ) -> None:
        """Start the rank and return at once; `greeting` makes the first order that it is given."""
        self._rank = rank
        self._description = description
        self._start = start
        self._greeting = greeting
        self._listener = listener
        self._started: StartedRank | None = None
        self._host = "not started"
        self._step_id = NOT_STARTED
        self._heard_at = time.monotonic()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"rank-{rank}", daemon=True)
        self._thread.start()

    def send(self, frame: bytes) -> None:
        """Send an order, which is a frame by now; one that cannot be sent loses the rank."""
        assert self._started is not None, "an order before the greeting"
        try:
            self._started.connection.sendall(frame)
        except OSError as error:
            self._lose(f"takes no more orders ({error})")

    def hang_up(self, *, is_killed: bool) -> None:
        """Begin to end the rank, politely or not."""
        self._is_closing.set()
        if self._started is not None:
            if is_killed:
                self._started.kill()
            else:
                self._say_goodbye(self._started.connection)
            _shut_down(self._started)

    def _say_goodbye(self, connection: socket.socket) -> None:
        try:
            connection.sendall(encode_frame(Leave()))
        except OSError as error:
            logger.debug("rank %d has left already: %s", self._rank, error)

    def join(self) -> None:
        """Wait until the rank is gone; `hang_up` came before."""
        self._thread.join()

    def _run(self) -> None:
        try:
            started = self._start(self._rank)
        except Exception as error:
            self._listener.lost(self._rank, error)
            return
        self._host = started.place.host
        self._started = started
        try:
            if self._is_closing.is_set():
                started.kill()
            else:
                self._hear(started)
        except Exception as error:  # of the listener
            self._listener.lost(self._rank, error)
        finally:
            started.connection.close()
            started.end()

    def _hear(self, started: StartedRank) -> None:
        """Hear the rank to its end, and tell of that."""
        try:
            if (failed := self._hear_reports(started.connection, started.place)) is not None:
                self._fail(failed)
                return
        except TimeoutError:
            started.kill()
            self._lose("is silent")
            return
        except ValueError as error:
            self._lose(f"cannot be understood ({error})")
            return
        except OSError as error:  # it died, and left orders unread
            logger.debug("the connection of rank %d: %s", self._rank, error)
        _shut_down(started)
        self._lose(f"died ({started.end()})")

    def _hear_reports(self, connection: socket.socket, place: Place) -> RankFailed | None:
        """Greet the rank and pass on what it reports until it fails, or has no more to say."""
        connection.settimeout(LOADING_SILENCE_S)
        connection.sendall(encode_frame(self._greeting(self._rank, place)))
        with connection.makefile("rb") as stream:
            while (payload := read_frame(stream)) is not None:
                self._heard_at = time.monotonic()
                match decode_report(payload):
                    case Beat(step_id):
                        self._step_id = step_id
                    case RankFailed() as failed:
                        return failed
                    case report:
                        if isinstance(report, Loaded):
                            connection.settimeout(SILENCE_S)
                        elif isinstance(report, StepEnded):
                            self._step_id = max(self._step_id, report.step.step_id)
                        self._listener.heard(self._rank, report)
        return None

    def _fail(self, failed: RankFailed) -> None:
        if failed.is_misconfiguration:
            self._listener.lost(self._rank, ConfigError(failed.message))
            return
        if failed.is_of_peer and self._is_closing.wait(PEER_GRACE_S):
            return
        self._lose(f"failed: {failed.message}")

    def _lose(self, what: str) -> None:
        if self._is_closing.is_set():
            return
        step = (
            "before its first step" if self._step_id == NOT_STARTED else f"at step {self._step_id}"
        )
        silence_s = time.monotonic() - self._heard_at
        self._listener.lost(
            self._rank,
            RankLostError(
                f"rank {self._rank} ({self._host}, {self._description}) {what} {step}; "
                f"last heard {silence_s:.1f} s ago"
            ),
        )


def _shut_down(started: StartedRank) -> None:
    """End a connection for both ends, and for the thread that reads it."""
    try:
        started.connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is over already
