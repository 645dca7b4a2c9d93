"""The clock of virtual time, for every executor that computes nothing.

Must not know: what is waited for.
"""

from __future__ import annotations

from math import inf


class VirtualClock:
    """Time that passes only when an executor waits."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        """Return the current time."""
        return self.time

    def wait(self, event: float, until: float) -> bool:
        """Let time pass to an event or to `until`, the sooner; return whether the event came.

        Time never goes back. Raises RuntimeError where neither will ever come.
        """
        moment = min(event, until)
        if moment == inf:
            raise RuntimeError("virtual time waits for ever: nothing runs, nothing will come")
        self.time = max(self.time, moment)
        return event <= until
