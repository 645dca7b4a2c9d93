"""Reads bodies, bounded in time and all together.

Rules: a body counts until it has been parsed. Where all that are being read hold too much, the one
that has taken longest ends: of those that come as fast as they can it is seldom one.
How large one may be is judged in gate.py. Must not know: JSON, routes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request

from fastserve.server.disconnect import ClientGoneError
from fastserve.server.errors import ApiError, unavailable

STALL_S = 30.0  # without a byte
NUM_LARGEST = 16  # bodies of the largest size that may be held together


@dataclass(slots=True, eq=False)
class Reading:
    """A body that is being read."""

    patience: asyncio.Timeout
    content: bytearray = field(default_factory=bytearray)
    is_whole: bool = False
    must_end: bool = False


class Bodies:
    """The bodies that are being read; all together hold at most `max_bytes`."""

    def __init__(self, max_bytes: int, stall_s: float = STALL_S) -> None:
        self._max_bytes = max_bytes
        self._stall_s = stall_s
        self._readings: dict[Reading, None] = {}  # the oldest first
        self.num_bytes = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytearray]:
        """Read a body, and hold it until the context is left.

        Raises ApiError for one that does not come (408) or for which there is no room (503), and
        ClientGoneError when the client leaves.
        """
        reading = Reading(asyncio.timeout(None))
        self._readings[reading] = None
        try:
            await self._fill(reading, request)
            reading.is_whole = True
            yield reading.content
        finally:
            self._forget(reading)

    async def _fill(self, reading: Reading, request: Request) -> None:
        now = asyncio.get_running_loop().time
        try:
            async with reading.patience:
                reading.patience.reschedule(now() + self._stall_s)
                async for piece in request.stream():
                    reading.content += piece
                    self.num_bytes += len(piece)
                    self._make_room(now())
                    if not reading.must_end:
                        reading.patience.reschedule(now() + self._stall_s)
        except ClientDisconnect as error:
            raise ClientGoneError from error
        except TimeoutError as error:
            if reading.must_end:
                raise unavailable("Too many bodies are being received.", "busy", 1) from error
            raise ApiError(
                408,
                f"No byte of the request body came for {self._stall_s:g} s.",
                code="request_timeout",
                headers={"Connection": "close"},
            ) from error

    def _make_room(self, now: float) -> None:
        num_too_many = self.num_bytes - self._max_bytes
        for reading in self._readings:
            if num_too_many <= 0:
                break
            if not reading.is_whole:
                num_too_many -= len(reading.content)
            if not (reading.is_whole or reading.must_end):
                reading.must_end = True
                reading.patience.reschedule(now)

    def _forget(self, reading: Reading) -> None:
        del self._readings[reading]
        self.num_bytes -= len(reading.content)
