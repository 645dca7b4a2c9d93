"""WorkThread: functions that run one after the other, on a thread of their own.

Rules: what is submitted has no result, so that handing it over is one call of a queue: a pool's
futures cost both sides of every step some tens of microseconds. Who wants a result calls, and
waits. A process that ends lets what runs come to its end first.
Must not know: what runs.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class WorkThread:
    """One thread, from now until `close`."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, task: Callable[[], object]) -> None:
        """Run a function, which must not raise, behind all that were given before it.

        Raises RuntimeError once the thread was closed.
        """
        if self._is_closed:
            raise RuntimeError(f"{self._thread.name} was closed")
        self._tasks.put(task)

    def call(self, function: Callable[[], T]) -> T:
        """Run a function behind all others, and return what it returns or raise what it raises."""
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except BaseException as error:
                answer.set_exception(error)

        self.submit(run)
        return answer.result()

    def close(self) -> None:
        """Finish what runs, leave out what has not begun, and end the thread."""
        atexit.unregister(self.close)
        self._is_closed = True
        self._tasks.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None and not self._is_closed:
            task()
