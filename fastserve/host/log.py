"""The log of a process: lines on stderr, written by a thread of its own.

Rules: who logs never waits. Where nobody reads stderr, MAX_WAITING lines wait; further ones are
dropped and counted, which is said once there is room again. Warnings that any client can cause are
said seldom (`once_in_a_while`). What is unwritten when the process ends has FLUSH_S. Lines go
straight to the descriptor: a thread that is stuck there holds no lock that the end of the process
would wait for.
Must not know: what is logged.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import select
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from fastserve.host.log_lines import LineFormatter

MAX_WAITING = 10_000  # lines
FLUSH_S = 1.0
SILENCE_S = 10.0  # between two warnings that say the same


def open_log(level: str, descriptor: int = 2) -> None:
    """Have messages of this level and above written to stderr."""
    handler = QueuedHandler(descriptor)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=level, handlers=[handler])


def once_in_a_while(
    silence_s: float = SILENCE_S, now: Callable[[], float] = time.monotonic
) -> Callable[[logging.LogRecord], bool]:
    """Return a filter that lets a warning pass once in so many seconds.

    It then says how often it was held back since. Errors, and what has a traceback, always pass.
    """
    silent_until: dict[str, float] = {}
    num_held_back: dict[str, int] = {}

    def passes(record: logging.LogRecord) -> bool:
        if record.levelno > logging.WARNING or record.exc_info is not None:
            return True
        message = record.msg
        if now() < silent_until.get(message, -math.inf):
            num_held_back[message] = num_held_back.get(message, 0) + 1
            return False
        silent_until[message] = now() + silence_s
        if count := num_held_back.pop(message, 0):
            record.msg += f" (and {count} times before)"
        return True

    return passes


def end_process(status: int) -> NoReturn:
    """End this process where it stands, from any thread; its last lines are written first."""
    logging.shutdown()
    os._exit(status)


class QueuedHandler(logging.Handler):
    """Writes lines to a descriptor; `close`, which logging calls at exit, waits a little for it."""

    def __init__(self, descriptor: int, max_waiting: int = MAX_WAITING) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[str | None] = queue.Queue(max_waiting)
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line, or count it where too many wait."""
        if self._num_dropped:
            told = f"{self._num_dropped} lines of the log were dropped: nobody read them"
            fields = {"levelname": "WARNING", "levelno": logging.WARNING, "msg": told}
            if self._put(self.format(logging.makeLogRecord(fields))):
                self._num_dropped = 0
        if self._num_dropped or not self._put(self.format(record)):
            self._num_dropped += 1

    def close(self) -> None:
        """Write what waits, for FLUSH_S at most."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=FLUSH_S)
        self._thread.join(FLUSH_S)
        super().close()

    def _put(self, line: str) -> bool:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            return False
        return True

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            rest = (line + "\n").encode(errors="backslashreplace")
            while rest:
                rest = rest[self._write(rest) :]

    def _write(self, line: bytes) -> int:
        """Write some of a line and return how many bytes."""
        try:
            return os.write(self._descriptor, line)
        except BlockingIOError:  # whoever shares the terminal has made it so
            select.select((), (self._descriptor,), ())
            return 0
        except OSError:  # the reader has gone: there is nobody left to tell
            return len(line)
