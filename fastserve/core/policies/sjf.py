"""Shortest job first, as far as a job is known: the prefill, and an answer as long as the mean.

A job is the seconds of the prefill that no cache spares, and of the decodes of a mean answer. These
differ by the context that they attend to alone, so a long prompt is a long job even where a cache
holds it. A baseline: what knows no more of an answer than the mean can do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from fastserve.core.cost_model import CostModel
from fastserve.core.policies.parts import SortedRequests, uncached_prefill_s
from fastserve.core.policies.protocol import Coldness
from fastserve.core.request import FinishReason, Request

PRIOR_TOKENS = 256.0  # of an answer, before the first has ended


class MeanAnswer:
    """The mean number of tokens of the answers that have ended.

    One that was aborted or met its limit is as long as it became; one that failed, or of which
    there is no token, does not count. Each change sorts all that wait anew, so `num_tokens` is the
    mean as it was when the number of answers last reached a power of two.
    """

    def __init__(self) -> None:
        self.num_tokens = PRIOR_TOKENS
        self._sum = self._count = 0

    def add(self, request: Request, reason: FinishReason) -> None:
        """Take an end in."""
        if reason is FinishReason.ERROR or not request.num_output_tokens:
            return
        self._sum += request.num_output_tokens
        self._count += 1
        if self._count.bit_count() == 1:
            self.num_tokens = self._sum / self._count


class ShortestJobFirst:
    """The order of those that wait: by the seconds of the job alone on the machine."""

    def __init__(self, cost_model: CostModel, max_chunk: int, mean: MeanAnswer) -> None:
        """`max_chunk` is the longest prefill share of one step, in tokens; others may share the
        `mean`.
        """
        self._cost_model = cost_model
        self._max_chunk = max_chunk
        self._mean = mean
        self._num_tokens = mean.num_tokens  # of an answer, as sorted by
        self._requests: SortedRequests[float] = SortedRequests()

    def __iter__(self) -> Iterator[Request]:
        """Yield the shortest job first, then by arrival."""
        return iter(self._requests)

    def put(self, request: Request) -> None:
        """Insert by the seconds of the job."""
        self._requests.put(request, self._job_s(request))

    def discard(self, request: Request) -> None:
        """Leave the order."""
        self._requests.discard(request)

    def finished(self, request: Request, reason: FinishReason) -> None:
        """Learn how long answers are."""
        self._mean.add(request, reason)

    def advance(self, now: float) -> None:
        """Sort anew when the mean has changed; time alone changes nothing."""
        if self._num_tokens != self._mean.num_tokens:
            self._num_tokens = self._mean.num_tokens
            jobs = [(self._job_s(request), request) for request in self._requests]
            self._requests = SortedRequests(jobs)

    def next_event(self, now: float) -> float:
        """Return inf."""
        return math.inf

    def key(self, request: Request) -> Coldness:
        """Return the seconds of the job."""
        return (self._requests.key(request),)

    def queues(self) -> Iterable[Iterable[Request]]:
        """Return the whole order."""
        return (self._requests,)

    def _job_s(self, request: Request) -> float:
        """Return the seconds of the uncached prefill and of the decodes of a mean answer."""
        middle = request.num_tokens + round(self._num_tokens / 2)
        answer_s = self._num_tokens * self._cost_model.decode_s(middle)
        return uncached_prefill_s(request, self._cost_model, self._max_chunk) + answer_s
