"""One engine process as its parent sees it: started on a socket, heard to its end, reaped.

Rules: closing our end of the socket asks it to leave; one that does not follow is killed. It gets
no signal of the terminal's: those are for the parent, which drains first.
Must not know: requests, what events mean, when a process is replaced.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import AsyncGenerator, Mapping, Sequence

from fastserve.wire.engine_messages import LENGTH, Event, decode_event

EXIT_GRACE_S = 5.0


class EngineProcess:
    """A running engine process."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str]) -> EngineProcess:
        """Start `command` with the number of an inherited socket appended."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                (*command, str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=environment,
                process_group=0,
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(process, reader, writer)

    def send(self, frame: bytes) -> None:
        """Send one frame."""
        self._writer.write(frame)

    def close(self) -> None:
        """Ask it to leave."""
        self._writer.close()

    async def events(self) -> AsyncGenerator[Event]:
        """Yield what it says until it has no more to say."""
        try:
            while True:
                (size,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
                yield decode_event(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return

    async def cause_of_death(self) -> str:
        """Wait for its end, and say in one line how it died."""
        status = await asyncio.to_thread(_reap, self.process)
        cause = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        return f"the engine process died ({cause})"


def _reap(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process whose connection has ended, and kill it if it does not follow."""
    try:
        return process.wait(EXIT_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
