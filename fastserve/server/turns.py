"""Long work on the event loop, a piece at a time. Must not know: what the work is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SHORT_S = 0.002  # work that is nothing to speak of


class Turns:
    """Gives work that cannot be interrupted half of the loop's time at most.

    Before the next piece of work the loop is left to others for as long as the last one took.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._others_until = 0.0

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` when its turn comes."""
        async with self._turn:
            rest_s = self._others_until - time.monotonic()
            if rest_s > 0:
                await asyncio.sleep(rest_s)
            began = time.monotonic()
            try:
                return work()
            finally:
                now = time.monotonic()
                self._others_until = now + (now - began) if now - began > SHORT_S else 0.0
