"""A child process on a socket: started by its parent, heard to its end, reaped.

Rules: closing the parent's end of the socket asks the child to leave; one that does not follow is
killed. The child gets no signal of the terminal's: those are for the parent, which drains first. It
does not outlive its parent. Both ends are here; what they say to each other is a schema handed in.
Must not know: what messages mean, when a child is replaced.
"""

from __future__ import annotations

import asyncio
import ctypes
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Generic, TypeVar

from fastserve.wire.frames import receive_frame

EXIT_GRACE_S = 5.0
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
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        return cls(process, reader, writer, decode, name)

    def send(self, frame: bytes) -> None:
        """Send one frame."""
        self._writer.write(frame)

    def close(self) -> None:
        """Ask it to leave."""
        self._writer.close()

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
    """Start `command` with the number of an inherited socket appended; return the other end too."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            (*command, str(theirs.fileno())),
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            env=environment,
            process_group=0,
        )
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
    connection = socket.socket(fileno=fd)
    connection.set_inheritable(False)
    return connection


def die_with_parent() -> None:
    """Ask Linux to kill this process when the thread that started it ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
