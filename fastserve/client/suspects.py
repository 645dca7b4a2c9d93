"""Finds the request that kills the engine, so that it ends and no other request does.

Rules: a death is charged to the requests whose step was under way, or, where the process could not
say, to all it had; a token that comes afterwards clears a request. A request that was charged
with two deaths in a row is a suspect: in the next process suspects run before all others, one at a
time, each until its next token. A death with one request under way, its second in a row, is that
request's: it fails. Must not know: processes, sockets, why an engine died.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from fastserve.wire.engine_messages import RequestNumber

DEATHS_OF_A_SUSPECT = 2


class Suspects:
    """Requests by the deaths in a row that they were present at; one of them may be on trial."""

    def __init__(self) -> None:
        self.on_trial: RequestNumber | None = None  # the only one that may run now
        self._deaths: dict[RequestNumber, int] = {}
        self._waiting: deque[RequestNumber] = deque()

    def charge(self, present: Sequence[RequestNumber]) -> RequestNumber | None:
        """Take note of a death; return the request that is to blame, if that is certain."""
        if self.on_trial is not None:
            present = (self.on_trial,)
        self.on_trial = None
        self._waiting.clear()
        for request in present:
            self._deaths[request] = self._deaths.get(request, 0) + 1
        if len(present) == 1 and self._deaths[present[0]] >= DEATHS_OF_A_SUSPECT:
            return present[0]
        return None

    def begin_trials(self) -> None:
        """Let the suspects wait for their turns: a new process is there."""
        self._waiting.extend(
            request for request, deaths in self._deaths.items() if deaths >= DEATHS_OF_A_SUSPECT
        )
        self._call_next()

    def clear(self, request: RequestNumber) -> bool:
        """Drop all charges: a token came, or the request ended. Return whether a trial ended."""
        if not self._deaths or self._deaths.pop(request, None) is None:
            return False
        if request != self.on_trial:
            return False
        self._call_next()
        return True

    def _call_next(self) -> None:
        self.on_trial = None
        while self._waiting and self.on_trial is None:
            request = self._waiting.popleft()
            if request in self._deaths:  # it has not ended meanwhile
                self.on_trial = request
