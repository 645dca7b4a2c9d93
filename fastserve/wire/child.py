"""A child process on a socket: started by its parent, heard to its end, reaped.

Rules: closing the parent's end of the socket asks the child to leave; one that does not follow is
killed. The child gets no signal of the terminal's: those are for the parent, which drains first. It
does not outlive its parent, nor a thread of its own that raised: nobody would do that one's work.
Both ends are here; what they say to each other is a schema handed in.
Must not know: what messages mean, when a child is replaced.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Generic, TypeVar

from fastserve.host.log import end_process
from fastserve.wire.frames import receive_frame

logger = logging.getLogger(__name__)

EXIT_GRACE_S = 5.0
THREAD_DIED = 70  # the exit status of a child whose thread raised; sysexits' internal error
PR_SET_PDEATHSIG = 1

Event = TypeVar("Event")


class Child(Generic[Event]):
    """A running child, as the event loop of its parent sees it."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decode: Callable[[bytes], Event],
        name: str,
    ) -> None:
        self.process = process
        self._reader = reader
        self._writer = writer
        self._decode = decode
        self._name = name

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        environment: Mapping[str, str],
        decode: Callable[[bytes], Event],
        name: str,
    ) -> Child[Event]:
        """Start `command`; `decode` reads what it says, `name` says in messages what it is."""
        process, connection = spawn(command, environment)
        try:
            reader, writer = await asyncio.open_unix_connection(sock=connection)
        except BaseException:
            connection.close()
            process.kill()
            process.wait()
            raise
        return cls(process, reader, writer, decode, name)

    def send(self, frame: bytes) -> None:
        """Send one frame."""
        self._writer.write(frame)

    def close(self) -> None:
        """Ask it to leave; what it has not read by now, and may never read, is not waited for."""
        self._writer.transport.abort()

    async def events(self) -> AsyncGenerator[Event]:
        """Yield what it says until it has no more to say."""
        while (payload := await receive_frame(self._reader)) is not None:
            yield self._decode(payload)

    async def cause_of_death(self) -> str:
        """Wait for its end, and say in one line how it died."""
        status = await asyncio.to_thread(reap, self.process)
        cause = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        return f"the {self._name} process died ({cause})"


def spawn(
    command: Sequence[str], environment: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start `command` with the number of an inherited socket appended; return the other end too.

    Raises OSError where this machine has no process or descriptor left; nothing is held then.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(
                (*command, str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=environment,
                process_group=0,
            )
        except BaseException:
            ours.close()
            raise
    return process, ours


def reap(process: subprocess.Popen[bytes]) -> int:
    """Wait for a child whose connection has ended, kill it if it does not follow; its status."""
    try:
        return process.wait(EXIT_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def be_child(fd: int) -> socket.socket:
    """Make this process a child on the inherited socket `fd`, and return the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent()
    threading.excepthook = _end_with_thread
    connection = socket.socket(fileno=fd)
    connection.set_inheritable(False)
    return connection


def _end_with_thread(raised: threading.ExceptHookArgs) -> None:
    if raised.exc_type is SystemExit or raised.exc_value is None:
        return
    name = "a thread" if raised.thread is None else f"the thread {raised.thread.name}"
    error = (raised.exc_type, raised.exc_value, raised.exc_traceback)
    logger.critical("%s died, and the process with it", name, exc_info=error)
    end_process(THREAD_DIED)


def die_with_parent() -> None:
    """Ask Linux to kill this process when the thread that started it ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
