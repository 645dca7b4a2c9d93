"""Static batching, as FasterTransformer's: a batch runs until its last request has ended.

The paper's second baseline. Kinder than the original in one respect: a request that ends before its
batch is answered at once; its place is not reused, which is what matters to the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

from fastserve.core.policies.protocol import Coldness
from fastserve.core.policies.reservation import WHOLE_IN_ORDER
from fastserve.core.request import FinishReason, Request


class Static:
    """Batches of up to `max_num_seqs` in order of arrival, one after the other."""

    reservation = WHOLE_IN_ORDER
    levels = None
    predictions = None

    def __init__(self, max_num_seqs: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._batch: dict[int, Request] = {}
        self._waiting: dict[int, Request] = {}

    def admit(self, request: Request, now: float) -> None:
        """Join the tail of those that wait for a batch."""
        self._waiting[request.handle] = request

    def ran(self, requests: Sequence[Request], now: float) -> None:
        """Work done does not change the order."""

    def finished(self, request: Request, reason: FinishReason) -> None:
        """Leave the batch, or those that wait."""
        self._take_out(request)

    def move(self, request: Request, to: Static) -> None:
        """Leave for the place by arrival among those that wait for a batch of the other."""
        self._take_out(request)
        to._waiting[request.handle] = request
        to._waiting = dict(sorted(to._waiting.items()))

    def advance(self, now: float) -> None:
        """Form the next batch when the last one is over."""
        if not self._batch:
            for handle in list(islice(self._waiting, self._max_num_seqs)):
                self._batch[handle] = self._waiting.pop(handle)

    def next_event(self, now: float) -> float:
        """Return inf: a batch ends with its last request, whatever the time."""
        return math.inf

    def ordered(self) -> Iterator[Request]:
        """Yield the batch; those that wait for the next one cannot run."""
        return iter(self._batch.values())

    def coldness(self, request: Request, now: float) -> Coldness:
        """Return the place by arrival."""
        return (request.handle,)

    def estimated_next_schedule_time(self, request: Request, now: float) -> None:
        """Nothing tells how long a batch runs."""

    def _take_out(self, request: Request) -> None:
        (self._batch if request.handle in self._batch else self._waiting).pop(request.handle)
