"""The heartbeat of an engine process: a thread that says that it lives, and looks for what hangs.

Rules: it beats from before anything is loaded, at intervals that the other end counts on. What
hangs cannot say so; it is asked for at each beat, and told of once it hangs at LOOKS beats in a
row: a process that was stopped itself has time to get on. Must not know: what is watched, what is
done about it.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from fastserve.engine.step_watch import Hang

LOOKS = 3


class Heartbeat:
    """Calls `beat` every `interval_s`; `overdue` and `on_hang` are set once there is work."""

    def __init__(self, beat: Callable[[], None], interval_s: float) -> None:
        self.overdue: Callable[[], Hang | None] = lambda: None
        self.on_hang: Callable[[Hang], None] = lambda hang: None
        self._beat = beat
        self._interval_s = interval_s
        self._is_over = threading.Event()
        threading.Thread(target=self._run, name="engine-heartbeat", daemon=True).start()

    def stop(self) -> None:
        """Beat no more: the process ends."""
        self._is_over.set()

    def _run(self) -> None:
        num_overdue = 0
        while not self._is_over.wait(self._interval_s):
            self._beat()
            hang = self.overdue()
            num_overdue = 0 if hang is None else num_overdue + 1
            if hang is not None and num_overdue == LOOKS:
                self.on_hang(hang)


def where_threads_are() -> list[str]:
    """Return one line for each thread but this one: its name, and its calls, the latest first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return [
        f"{names.get(ident, ident)}: " + " < ".join(reversed(calls_of(frame)))
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    ]


def calls_of(frame: FrameType) -> list[str]:
    """Return the calls that a thread is in, the first one first."""
    return [
        f"{call.name} ({Path(call.filename).name}:{call.lineno})"
        for call in traceback.extract_stack(frame)
    ]
