"""Threads for work on long texts: few of them, and only so much text that waits for one.

Rules: work that cannot be stopped keeps its thread until it ends, whoever still wants it; work that
has not begun goes with its caller, and its text too. Huge texts have a thread of their own, one
after the other: one takes a hundred times its own memory, which the allocator keeps for the thread.
Must not know: what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from fastserve.server.errors import unavailable

T = TypeVar("T")

LONG_TEXT = 4096  # characters from which work is worth a thread
HUGE_TEXT = 2**20
NUM_THREADS = 2
MAX_CHARS = 32 * 2**20  # of all texts that wait or are worked on


class TextPool:
    """Runs work on texts, off the event loop where they are long."""

    def __init__(self, num_threads: int = NUM_THREADS, max_chars: int = MAX_CHARS) -> None:
        self._long = Lane(num_threads, "text")
        self._huge = Lane(1, "huge text")
        self._max_chars = max_chars
        self.num_chars = 0

    async def run(self, num_chars: int, work: Callable[[], T]) -> T:
        """Run `work`, which is about so many characters; ApiError (503) when too much waits."""
        if num_chars < LONG_TEXT:
            return work()
        if self.num_chars + num_chars > self._max_chars:
            raise unavailable("Too much text is waiting to be tokenized.", "busy", 1)
        self.num_chars += num_chars
        lane = self._long if num_chars < HUGE_TEXT else self._huge
        try:
            await lane.idle.acquire()
        except asyncio.CancelledError:
            self.num_chars -= num_chars
            raise
        loop = asyncio.get_running_loop()

        def give_back() -> None:
            self.num_chars -= num_chars
            lane.idle.release()

        def end(_: Future[T]) -> None:
            loop.call_soon_threadsafe(give_back)

        running = lane.threads.submit(work)
        running.add_done_callback(end)
        return await asyncio.wrap_future(running)


class Lane:
    """Some threads, and as many places."""

    def __init__(self, num_threads: int, name: str) -> None:
        self.threads = ThreadPoolExecutor(num_threads, name)
        self.idle = asyncio.Semaphore(num_threads)
