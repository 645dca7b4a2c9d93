"""Finds the request that kills the engine, so that it ends and no other request does.

Rules: a death is charged to the requests whose step was under way, or, where the process could not
say, to all it had; a token that comes afterwards clears a request. A request that was charged
with two deaths in a row is a suspect: it runs nowhere but in a process that has just loaded, which
runs suspects before all others, one at a time, each until its next token. Other replicas go on
meanwhile, without them. A death in its trial is that request's: it fails. Two are no proof, even
where it was alone: what kills from outside may strike twice before a token.
Must not know: processes, sockets, why an engine died.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from fastserve.wire.engine_messages import RequestNumber

DEATHS_OF_A_SUSPECT = 2


class Suspects:
    """Requests by the deaths in a row that they were present at; one of them may be on trial."""

    def __init__(self) -> None:
        self.on_trial: RequestNumber | None = None
        self.trial_at: int | None = None  # the replica that runs nothing else now
        self._deaths: dict[RequestNumber, int] = {}
        self._waiting: deque[RequestNumber] = deque()

    @property
    def untried(self) -> list[RequestNumber]:
        """The suspects that run nowhere now."""
        return [
            request
            for request, deaths in self._deaths.items()
            if deaths >= DEATHS_OF_A_SUSPECT and request != self.on_trial
        ]

    def may_run(self, request: RequestNumber, replica: int) -> bool:
        """Return whether a replica may be given a request at this moment."""
        if replica == self.trial_at:
            return request == self.on_trial
        return self._deaths.get(request, 0) < DEATHS_OF_A_SUSPECT

    def charge(self, present: Sequence[RequestNumber], replica: int = 0) -> RequestNumber | None:
        """Take note of a replica's death; return the request that is to blame, if it is certain."""
        culprit: RequestNumber | None = None
        if replica == self.trial_at:
            assert self.on_trial is not None
            culprit = self.on_trial
            present = (culprit,)
            self.on_trial = self.trial_at = None
            self._waiting.clear()
        for request in present:
            self._deaths[request] = self._deaths.get(request, 0) + 1
        if self.trial_at is not None:  # new suspects are tried there too
            self._line_up()
        return culprit

    def begin_trials(self, replica: int = 0) -> None:
        """Try the suspects in a replica that has just loaded, unless another tries them."""
        if self.trial_at is None:
            self._line_up()
            self._call_next(replica)

    def clear(self, request: RequestNumber) -> bool:
        """Drop all charges: a token came, or the request ended. Return whether a trial ended."""
        if not self._deaths or self._deaths.pop(request, None) is None:
            return False
        if request != self.on_trial:
            return False
        assert self.trial_at is not None
        self._call_next(self.trial_at)
        return True

    def _line_up(self) -> None:
        self._waiting.extend(request for request in self.untried if request not in self._waiting)

    def _call_next(self, replica: int) -> None:
        self.on_trial = self.trial_at = None
        while self._waiting and self.on_trial is None:
            request = self._waiting.popleft()
            if request in self._deaths:  # it has not ended meanwhile
                self.on_trial, self.trial_at = request, replica
