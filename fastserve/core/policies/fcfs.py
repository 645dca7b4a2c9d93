"""First come, first served, run to completion: Orca's order, vLLM's default.

The baseline. A request that has begun is only ever preempted when KV blocks run out, and then
the youngest loses. With everything that it could ever need reserved at the start it is Orca (OSDI
2022), the paper's main baseline: a request that has begun never runs out of blocks, and few begin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from fastserve.core.policies.protocol import Coldness
from fastserve.core.policies.reservation import ON_DEMAND_IN_ORDER, Reservation
from fastserve.core.request import FinishReason, Request


class FCFS:
    """One queue in order of arrival."""

    levels = None
    predictions = None

    def __init__(self, reservation: Reservation = ON_DEMAND_IN_ORDER) -> None:
        self.reservation = reservation
        self._requests: dict[int, Request] = {}

    def admit(self, request: Request, now: float) -> None:
        """Join the tail."""
        self._requests[request.handle] = request

    def ran(self, requests: Sequence[Request], now: float) -> None:
        """Work done does not change the order."""

    def finished(self, request: Request, reason: FinishReason) -> None:
        """Leave the queue."""
        del self._requests[request.handle]

    def move(self, request: Request, to: FCFS) -> None:
        """Leave this queue for the place by arrival in another."""
        del self._requests[request.handle]
        is_last = not to._requests or next(reversed(to._requests)) < request.handle
        to._requests[request.handle] = request
        if not is_last:
            to._requests = dict(sorted(to._requests.items()))

    def advance(self, now: float) -> None:
        """Time does not change the order."""

    def next_event(self, now: float) -> float:
        """Return inf."""
        return math.inf

    def ordered(self) -> Iterator[Request]:
        """Yield by arrival."""
        return iter(self._requests.values())

    def coldness(self, request: Request, now: float) -> Coldness:
        """Return the place by arrival: the youngest loses its KV first."""
        return (request.handle,)

    def estimated_next_schedule_time(self, request: Request, now: float) -> None:
        """Nothing tells how long those ahead will run."""
