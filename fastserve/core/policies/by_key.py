"""By a key: a number that a request alone tells, the least first, changed by steps it ran in alone.

What a baseline is sorted by is all that its own file says. Must not know: what the number means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from fastserve.core.policies.parts import SortedRequests
from fastserve.core.policies.protocol import Coldness
from fastserve.core.policies.reservation import ON_DEMAND
from fastserve.core.request import FinishReason, Request


class ByKey:
    """Requests sorted by a key, then by arrival."""

    reservation = ON_DEMAND
    levels = None
    predictions = None

    def __init__(self, key: Callable[[Request], float]) -> None:
        self._key = key
        self._requests: SortedRequests[float] = SortedRequests()

    def admit(self, request: Request, now: float) -> None:
        """Insert by key."""
        self._requests.put(request, self._key(request))

    def ran(self, requests: Sequence[Request], now: float) -> None:
        """Move those whose key the step has changed."""
        for request in requests:
            key = self._key(request)
            if key != self._requests.key(request):
                self._requests.put(request, key)

    def finished(self, request: Request, reason: FinishReason) -> None:
        """Leave the order."""
        self._requests.discard(request)

    def move(self, request: Request, to: ByKey) -> None:
        """Leave this order for the other."""
        to._requests.put(request, self._requests.discard(request))

    def advance(self, now: float) -> None:
        """Time does not change the order."""

    def next_event(self, now: float) -> float:
        """Return inf."""
        return math.inf

    def ordered(self) -> Iterator[Request]:
        """Yield the least keys first."""
        return iter(self._requests)

    def coldness(self, request: Request, now: float) -> Coldness:
        """Return the key: the last in the order lose their KV first."""
        return (self._requests.key(request),)

    def estimated_next_schedule_time(self, request: Request, now: float) -> None:
        """Nothing tells how long those ahead will run."""
