"""Waiting requests in kinds: like ones stand in one line, and only the lines have keys.

Rules: a line is first come, first served, so two of a kind never change places whatever is learned
meanwhile; between lines the least of `arrived_at − boost_s` of their heads goes first. A boost
belongs to a line, so to learn something costs as much as there are kinds, not requests.
Must not know: what makes two requests alike, what a boost comes from.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from fastserve.core.lengths import Labels
from fastserve.core.policies.parts import SortedRequests
from fastserve.core.request import Request

Keyed = tuple[float, int, Request]
"""A request behind its key and its handle: as tuples they are in order."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What is alike in the requests of a line."""

    labels: Labels
    max_tokens: int | None  # the bin of its own limit; None: the window's end is all that limits
    prefill_s: float  # the machine seconds of its prompt
    prompt_tokens: float


@dataclass(slots=True, eq=False)
class Line:
    """The waiting requests of a kind, with what is expected of each of them."""

    kind: Kind
    boost_s: float = 0.0
    work_s: float = 0.0
    requests: dict[int, Request] = field(default_factory=dict)

    def head(self) -> Request:
        """Return the request that came first."""
        return next(iter(self.requests.values()))


class Lines:
    """All lines, by the key of their heads."""

    def __init__(self) -> None:
        self._by_kind: dict[Kind, Line] = {}
        self._by_head: dict[int, Line] = {}
        self._heads: SortedRequests[float] = SortedRequests()

    def __iter__(self) -> Iterator[Keyed]:
        """Yield all requests by key, lazily."""
        opened: list[tuple[float, int, Request, Line, Iterator[Request]]] = []
        for keyed in self._heads.keyed():
            while opened and opened[0] < keyed:
                yield self._next(opened)
            line = self._by_head[keyed[1]]
            behind = iter(line.requests.values())
            heapq.heappush(opened, (*keyed, line, behind))
            next(behind)
        while opened:
            yield self._next(opened)

    def lines(self) -> Iterator[Line]:
        """Yield every line; none is empty."""
        return iter(self._by_kind.values())

    def line(self, kind: Kind) -> Line | None:
        """Return the line of a kind, if any of it waits."""
        return self._by_kind.get(kind)

    def key(self, line: Line, request: Request) -> float:
        """Return the key of a request in a line."""
        return request.arrived_at - line.boost_s

    def join(self, line: Line, request: Request) -> None:
        """Put a request into a line, which may be new: at its end, but for one that came before."""
        requests = line.requests
        is_last = not requests or next(reversed(requests)) < request.handle
        if requests and not is_last:
            self._hide(line)
        requests[request.handle] = request
        if not is_last:
            line.requests = dict(sorted(requests.items()))
        if len(line.requests) == 1:
            self._by_kind[line.kind] = line
        if len(line.requests) == 1 or not is_last:
            self._show(line)

    def leave(self, line: Line, request: Request) -> None:
        """Take a request out of its line, which goes with its last one."""
        is_head = request.handle in self._by_head
        if is_head:
            self._hide(line)
        del line.requests[request.handle]
        if not line.requests:
            del self._by_kind[line.kind]
        elif is_head:
            self._show(line)

    def boost(self, line: Line, boost_s: float) -> None:
        """Give a line that is not empty another boost."""
        self._hide(line)
        line.boost_s = boost_s
        self._show(line)

    def _show(self, line: Line) -> None:
        head = line.head()
        self._by_head[head.handle] = line
        self._heads.put(head, self.key(line, head))

    def _hide(self, line: Line) -> None:
        head = line.head()
        del self._by_head[head.handle]
        self._heads.discard(head)

    def _next(self, opened: list[tuple[float, int, Request, Line, Iterator[Request]]]) -> Keyed:
        """Take the first of the opened lines and put the one behind it in its place."""
        key, handle, request, line, behind = opened[0]
        following = next(behind, None)
        if following is None:
            heapq.heappop(opened)
        else:
            keyed = (self.key(line, following), following.handle, following)
            heapq.heapreplace(opened, (*keyed, line, behind))
        return key, handle, request
