"""Begun: the requests that have begun, by key, behind the streams that have paused for too long.

Rules: a stream, one that has an answer in part, is watched from its first token on. Once it has not
run for `max_pause_s` and holds KV it is lifted: it goes first until it has run once. One without KV
is left where it is: to compute it all again for a token would cost others more than the pause costs
it. Must not know: what a key comes from, who waits to begin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from fastserve.core.policies.kinds import Keyed
from fastserve.core.policies.parts import Deadlines, SortedRequests
from fastserve.core.request import Request


class Place(NamedTuple):
    """Where a request stood; `due` is when it may have paused for too long, if it is watched."""

    key: float
    is_lifted: bool
    due: float | None


class Begun:
    """Requests that have a key of their own."""

    def __init__(self, max_pause_s: float) -> None:
        self._max_pause_s = max_pause_s
        self._order: SortedRequests[float] = SortedRequests()
        self._lifted: dict[int, tuple[Request, float]] = {}
        self._deadlines = Deadlines()  # of streams; one that has run since is found when due
        self._watched: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._order) + len(self._lifted)

    def __iter__(self) -> Iterator[Request]:
        return chain(self._order, self.lifted())

    def keyed(self) -> Iterator[Keyed]:
        """Yield those that are not lifted, by key."""
        return self._order.keyed()

    def lifted(self) -> Iterator[Request]:
        """Yield those that go first."""
        return (request for request, _ in self._lifted.values())

    def is_lifted(self, request: Request) -> bool:
        """Return whether it goes first."""
        return request.handle in self._lifted

    def key(self, request: Request) -> float:
        """Return the key by which it goes now."""
        return -math.inf if request.handle in self._lifted else self._order.key(request)

    def put(self, request: Request, key: float) -> None:
        """Take in a request, or move it to where a new key belongs."""
        handle = request.handle
        if handle in self._lifted:
            self._lifted[handle] = (request, key)
        else:
            self._order.put(request, key)
        if request.num_output_tokens and handle not in self._watched:
            self._watch(request, request.last_ran_at + self._max_pause_s)

    def take(self, request: Request) -> Place:
        """Let go of a request, and return where it stood."""
        handle = request.handle
        found = self._lifted.pop(handle, None)
        key = self._order.discard(request) if found is None else found[1]
        self._watched.pop(handle, None)
        return Place(key, found is not None, self._deadlines.discard(handle))

    def restore(self, request: Request, place: Place) -> None:
        """Take in a request where it stood in another."""
        self._order.put(request, place.key)
        if place.is_lifted:
            self._lift(request)
        if place.due is not None:
            self._watch(request, place.due)

    def ran(self, requests: Sequence[Request]) -> None:
        """Let those go by key again that were lifted and have run."""
        lifted = self._lifted
        if lifted:
            for request in requests:
                found = lifted.pop(request.handle, None)
                if found is not None:
                    self._order.put(*found)

    # ── pauses ───────────────────────────────────────────────────────────────────────────────

    def lift_paused(self, now: float) -> None:
        """Put the streams first that have not run for long enough."""
        looked_at: list[tuple[int, float]] = []  # put back at the end: the limit may be no time
        while (entry := self._deadlines.pop(now)) is not None:
            handle = entry[1]
            request = self._watched[handle]
            due = request.last_ran_at + self._max_pause_s
            if due <= now:
                due = now + self._max_pause_s
                if request.table is not None and not request.steps_in_flight:
                    self._lift(request)
            looked_at.append((handle, due))
        for handle, due in looked_at:
            self._deadlines.put(handle, due)

    def next_event(self) -> float:
        """Return the earliest time at which one may have paused for too long."""
        return self._deadlines.first()[0]

    def _watch(self, request: Request, due: float) -> None:
        self._watched[request.handle] = request
        self._deadlines.put(request.handle, due)

    def _lift(self, request: Request) -> None:
        if request.handle not in self._lifted:
            self._lifted[request.handle] = (request, self._order.discard(request))
