"""Parts that several policies are made of: a sorted order, deadlines, the time of a prefill.

Must not know: what is sorted by, what happens at a deadline.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from fastserve.core.cost_model import CostModel
from fastserve.core.request import Request

MAX_STALE = 64  # heap entries kept beyond two for each deadline

Key = TypeVar("Key", float, tuple[float, ...])


class SortedRequests(Generic[Key]):
    """Requests by ascending key, then by arrival."""

    def __init__(self, keyed: Iterable[tuple[Key, Request]] = ()) -> None:
        self._order: list[tuple[Key, int, Request]]
        self._order = sorted((key, request.handle, request) for key, request in keyed)
        self._keys: dict[int, Key] = {handle: key for key, handle, _ in self._order}

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Request]:
        return (request for _, _, request in self._order)

    def keyed(self) -> Iterator[tuple[Key, int, Request]]:
        """Yield each request behind its key and its handle."""
        return iter(self._order)

    def key(self, request: Request) -> Key:
        """Return the key that a request was put in with."""
        return self._keys[request.handle]

    def put(self, request: Request, key: Key) -> None:
        """Insert a request, or move it to where a new key belongs."""
        if request.handle in self._keys:
            self.discard(request)
        self._keys[request.handle] = key
        insort(self._order, (key, request.handle, request))

    def discard(self, request: Request) -> Key:
        """Take a request out and return its key."""
        key = self._keys.pop(request.handle)
        del self._order[bisect_left(self._order, (key, request.handle))]
        return key


class Deadlines:
    """At most one deadline for each handle; the earliest is found in logarithmic time.

    A heap whose entries count only while they agree with the deadlines; it is rebuilt when most do
    not.
    """

    def __init__(self) -> None:
        self._due: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, handle: int) -> bool:
        return handle in self._due

    def put(self, handle: int, due: float) -> None:
        """Set or replace a deadline."""
        self._due[handle] = due
        heapq.heappush(self._heap, (due, handle))
        if len(self._heap) > MAX_STALE + 2 * len(self._due):
            self._heap = sorted((due, handle) for handle, due in self._due.items())

    def discard(self, handle: int) -> float | None:
        """Take a deadline out and return it; None if there is none."""
        return self._due.pop(handle, None)

    def pop(self, now: float) -> tuple[float, int] | None:
        """Take out the earliest deadline and return it with its handle; None if none is due."""
        heap, deadlines = self._heap, self._due
        while heap and heap[0][0] <= now:
            entry = heapq.heappop(heap)
            if deadlines.get(entry[1]) == entry[0]:
                del deadlines[entry[1]]
                return entry
        return None

    def first(self) -> tuple[float, int]:
        """Return the earliest deadline and its handle, (inf, -1) where there are none."""
        heap, due = self._heap, self._due
        while heap and due.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0] if heap else (math.inf, -1)


def uncached_prefill_s(request: Request, cost_model: CostModel, max_chunk: int) -> float:
    """Return the seconds of the whole prefill that no cache spares, chunk by chunk, alone.

    `max_chunk` is the longest share of one step, in tokens.
    """
    start = request.num_cached_tokens
    return cost_model.prefill_s(request.num_tokens - start, start, max_chunk)
