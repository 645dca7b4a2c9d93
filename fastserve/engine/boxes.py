"""What an engine process is told and what it says: a thread at each direction of its socket.

Rules: the loop never waits for the socket; frames come and go in order. That the other end has gone
is seen by who reads. Must not know: what commands and events mean.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
from collections.abc import Callable

from fastserve.wire.engine_messages import Command, Event, decode_command
from fastserve.wire.frames import encode_frame, read_frame

logger = logging.getLogger(__name__)


class Inbox:
    """Reads commands on a thread of its own; `on_arrival` is told of each, and of the end."""

    def __init__(self, connection: socket.socket) -> None:
        self.has_ended = False  # the other end has gone
        self.is_closed = False  # and everything it had sent was taken
        self.on_arrival: Callable[[], None] = lambda: None
        self._stream = connection.makefile("rb")
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="engine-inbox", daemon=True).start()

    def _read(self) -> None:
        try:
            while (payload := read_frame(self._stream)) is not None:
                self._commands.put(decode_command(payload))
                self.on_arrival()
        except ConnectionResetError:  # it went with something unread: no fault of ours
            logger.debug("the API process is gone")
        except (OSError, ValueError):
            logger.exception("the connection to the API process broke")
        finally:
            self.has_ended = True
            self._commands.put(None)
            self.on_arrival()

    def get(self) -> Command | None:
        """Wait for one command; None when the other end has gone."""
        command = self._commands.get()
        self.is_closed |= command is None
        return command

    def drain(self) -> list[Command]:
        """Return the commands that have arrived, without waiting."""
        commands = []
        while not self.is_closed and not self._commands.empty():
            if (command := self.get()) is not None:
                commands.append(command)
        return commands


class Outbox:
    """Writes events on a thread of its own, so that a slow reader never holds up a step."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="engine-outbox", daemon=True)
        self._thread.start()

    def send(self, event: Event) -> None:
        """Queue one event."""
        self._events.put(event)

    def close(self, limit_s: float | None = None) -> None:
        """Write what is queued, then stop; with a limit not everything may be written."""
        self._events.put(None)
        self._thread.join(limit_s)

    def _write(self) -> None:
        try:
            while (event := self._events.get()) is not None:
                self._connection.sendall(encode_frame(event))
        except OSError as error:  # the inbox sees the same end and stops the loop
            logger.debug("the API process is gone: %s", error)
