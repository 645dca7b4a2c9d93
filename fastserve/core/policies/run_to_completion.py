"""Run to completion: which request begins next is an order of its own; none that has begun waits.

A request has begun once a plan has had it, even if it has lost its KV since. Those that have begun
stay ahead of all others, in the order in which they began, and lose KV from its end. Memory that
the next to begin lacks holds up those behind it, as under `fcfs`: nothing but the order differs.
Must not know: what the others are ordered by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Protocol

from fastserve.core.policies.parts import SortedRequests
from fastserve.core.policies.protocol import Coldness
from fastserve.core.policies.reservation import ON_DEMAND_IN_ORDER
from fastserve.core.request import FinishReason, Request


class WaitingOrder(Protocol):
    """The requests that have not begun, first to begin first.

    It keeps the promises of a Policy: only `advance` lets time change the order, and to iterate
    changes nothing and is lazy.
    """

    def __iter__(self) -> Iterator[Request]:
        """Yield the requests in order."""

    def put(self, request: Request) -> None:
        """Take a request in."""

    def discard(self, request: Request) -> None:
        """Let go of a request, which has begun, ended or gone elsewhere."""

    def finished(self, request: Request, reason: FinishReason) -> None:
        """Note that a request, begun or not, has ended; it is not in this order any more."""

    def advance(self, now: float) -> None:
        """Let time change the order."""

    def next_event(self, now: float) -> float:
        """Return a time before which time alone changes nothing; inf where it never will."""

    def key(self, request: Request) -> Coldness:
        """Return what the order ascends by; the older goes first of two that are equal."""

    def queues(self) -> Iterable[Iterable[Request]]:
        """Return parts of the order, each in order: what begins begins at the head of one."""


class RunToCompletion:
    """Requests that have begun, then a WaitingOrder of the others."""

    reservation = ON_DEMAND_IN_ORDER
    levels = None
    predictions = None

    def __init__(self, waiting: WaitingOrder) -> None:
        self._waiting = waiting
        # By when they began, then by where they stood among the others.
        self._begun: SortedRequests[Coldness] = SortedRequests()
        self._waiting_handles: set[int] = set()
        self._new_handles: set[int] = set()  # of those that joined the others after `advance`

    def admit(self, request: Request, now: float) -> None:
        """Join those that have not begun."""
        self._wait(request)

    def ran(self, requests: Sequence[Request], now: float) -> None:
        """Move those that have begun ahead."""
        for request in requests:
            if request.handle in self._waiting_handles:
                self._begin(request)

    def finished(self, request: Request, reason: FinishReason) -> None:
        """Leave, and tell the order of those that have not begun."""
        if request.handle in self._waiting_handles:
            self._stop_waiting(request)
        else:
            self._begun.discard(request)
        self._waiting.finished(request, reason)

    def move(self, request: Request, to: RunToCompletion) -> None:
        """Leave for the place in the other, begun or not."""
        if request.handle in self._waiting_handles:
            self._stop_waiting(request)
            to._wait(request)
        else:
            to._begun.put(request, self._begun.discard(request))

    def advance(self, now: float) -> None:
        """Move those ahead that the last plans have taken up, then let time order the others.

        They are sought at the heads of the queues, since their first step may be in flight still.
        One that began behind a request that could not is found when that step lands.
        """
        taken_up = [
            request for queue in self._waiting.queues() for request in self._taken_up(queue)
        ]
        for request in taken_up:
            self._begin(request)
        self._new_handles.clear()
        self._waiting.advance(now)

    def next_event(self, now: float) -> float:
        """Return when time may change the order of those that have not begun."""
        return self._waiting.next_event(now)

    def ordered(self) -> Iterator[Request]:
        """Yield those that have begun, by when; then the others in their order."""
        return chain(self._begun, self._waiting)

    def coldness(self, request: Request, now: float) -> Coldness:
        """Return when it began: the last loses its KV first; the others are colder, in order."""
        if request.handle not in self._waiting_handles:
            return (0.0, *self._begun.key(request))
        if request.first_scheduled_at is None:
            return (1.0, *self._waiting.key(request))
        return (0.0, *self._began(request))

    def estimated_next_schedule_time(self, request: Request, now: float) -> None:
        """Nothing tells how long those that have begun will run."""

    def _wait(self, request: Request) -> None:
        self._waiting_handles.add(request.handle)
        self._new_handles.add(request.handle)
        self._waiting.put(request)

    def _stop_waiting(self, request: Request) -> None:
        self._waiting_handles.discard(request.handle)
        self._new_handles.discard(request.handle)
        self._waiting.discard(request)

    def _begin(self, request: Request) -> None:
        began = self._began(request)
        self._stop_waiting(request)
        self._begun.put(request, began)

    def _began(self, request: Request) -> Coldness:
        """Return when a request began, and its place among those of the same plan."""
        assert request.first_scheduled_at is not None
        return (request.first_scheduled_at, *self._waiting.key(request))

    def _taken_up(self, queue: Iterable[Request]) -> Iterator[Request]:
        """Yield those that have begun: the head of a queue, but for what joined it since."""
        for request in queue:
            if request.first_scheduled_at is not None:
                yield request
            elif request.handle not in self._new_handles:
                return
