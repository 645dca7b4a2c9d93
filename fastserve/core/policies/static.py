"""Static batching, as FasterTransformer's: a batch runs until its last request has ended.

The paper's second baseline. Kinder than the original in one respect: a request that ends before its
batch is answered at once; its place is not reused, which is what matters to the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from fastserve.core.policies.fcfs import FCFS
from fastserve.core.request import Request


class Static(FCFS):
    """Batches of up to `max_num_seqs` in order of arrival, one after the other."""

    def __init__(self, max_num_seqs: int) -> None:
        super().__init__()
        self._max_num_seqs = max_num_seqs
        self._batch: dict[int, Request] = {}

    def remove(self, request: Request) -> None:
        """Leave the queue and the batch."""
        super().remove(request)
        self._batch.pop(request.handle, None)

    def ordered(self, now: float) -> Iterator[Request]:
        """Yield the batch; only when it is empty, whoever waits forms the next."""
        if not self._batch:
            waiting = islice(self._requests.values(), self._max_num_seqs)
            self._batch = {request.handle: request for request in waiting}
        return iter(self._batch.values())

    def reserve_tokens(self, request: Request) -> int:
        """Return everything the request could ever need."""
        return request.max_num_tokens
