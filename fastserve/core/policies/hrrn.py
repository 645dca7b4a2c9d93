"""Highest response ratio next: the short first, but the longer one waits the less short it must be.

The response ratio is (waiting time + service) / service (Brinch Hansen, 1971); service is here the
seconds of the prefill that no cache spares, as known at arrival, since the length of the answer is
not. A baseline: SGLang has such a policy, by tokens. Rules: two roundings keep the order cheap with
thousands that wait. Services are rounded to the nearest power of 2^(1/8) seconds, at most 4.5 %
off, so that those of equal service are one queue by arrival. Time changes the ratios once in a
minimum iteration time, the shortest step there is, and not in between.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator

from fastserve.core.cost_model import CostModel
from fastserve.core.policies.parts import SortedRequests, uncached_prefill_s
from fastserve.core.policies.protocol import Coldness
from fastserve.core.request import FinishReason, Request

SERVICES_PER_DOUBLING = 8


class HighestRatioNext:
    """The order of those that wait: one queue by arrival for each rounded service."""

    def __init__(self, cost_model: CostModel, max_chunk: int) -> None:
        """`max_chunk` is the longest prefill share of one step, in tokens."""
        self._cost_model = cost_model
        self._max_chunk = max_chunk
        self._queues: dict[int, SortedRequests[float]] = {}
        self._queue_of: dict[int, int] = {}
        self._ranked_at = -math.inf

    def __iter__(self) -> Iterator[Request]:
        """Yield the highest response ratio first; the shorter first of two that are equal."""
        return heapq.merge(*self._queues.values(), key=self.key)

    def put(self, request: Request) -> None:
        """Join the queue of its service, by arrival."""
        service_s = uncached_prefill_s(request, self._cost_model, self._max_chunk)
        service_s = max(service_s, self._cost_model.min_iteration_s)
        index = round(math.log2(service_s) * SERVICES_PER_DOUBLING)
        self._queue_of[request.handle] = index
        self._queues.setdefault(index, SortedRequests()).put(request, request.arrived_at)

    def discard(self, request: Request) -> None:
        """Leave the queue."""
        index = self._queue_of.pop(request.handle)
        self._queues[index].discard(request)
        if not self._queues[index]:
            del self._queues[index]

    def finished(self, request: Request, reason: FinishReason) -> None:
        """Ends teach nothing."""

    def advance(self, now: float) -> None:
        """Rank by the waiting times of this moment, where the last ones are old enough."""
        if now >= self._ranked_at + self._cost_model.min_iteration_s:
            self._ranked_at = now

    def next_event(self, now: float) -> float:
        """Return when the waiting times will be old; inf where they do not matter."""
        if len(self._queues) < 2:
            return math.inf
        return self._ranked_at + self._cost_model.min_iteration_s

    def key(self, request: Request) -> Coldness:
        """Return 1 less the response ratio, then the service and the arrival."""
        service_s = math.exp2(self._queue_of[request.handle] / SERVICES_PER_DOUBLING)
        wait_s = max(self._ranked_at - request.arrived_at, 0.0)
        return (-wait_s / service_s, service_s, request.arrived_at)

    def queues(self) -> Iterable[Iterable[Request]]:
        """Return the queue of each service."""
        return self._queues.values()
