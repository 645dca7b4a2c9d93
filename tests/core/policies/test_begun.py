"""Begun: streams that paused for too long go first, once; the others by their keys."""

from __future__ import annotations

import math

from fastserve.core.memory.table import BlockTable
from fastserve.core.policies.begun import Begun
from fastserve.core.request import Request
from tests.core.builders import make_request


def stream(handle: int, last_ran_at: float, *, has_kv: bool = True) -> Request:
    """Return a request that has the first token of its answer."""
    request = make_request(handle)
    request.append(7)
    request.last_ran_at = last_ran_at
    request.table = BlockTable([]) if has_kv else None
    return request


def order(begun: Begun) -> list[int]:
    """Return the handles in order."""
    lifted = [request.handle for request in begun.lifted()]
    return lifted + [handle for _, handle, _ in begun.keyed()]


def test_a_stream_that_paused_goes_first_until_it_has_run_once() -> None:
    """One without KV, one that has run meanwhile and one without an answer do not."""
    begun = Begun(max_pause_s=1.0)
    paused, dropped = stream(3, 0.0), stream(2, 0.0, has_kv=False)
    ran, prompt = stream(1, 0.0), make_request(0)
    for key, request in enumerate((prompt, ran, dropped, paused)):
        begun.put(request, float(key))
    assert (order(begun), begun.next_event()) == ([0, 1, 2, 3], 1.0)
    ran.last_ran_at = 0.5
    begun.lift_paused(1.0)
    assert (order(begun), begun.key(paused)) == ([3, 0, 1, 2], -math.inf)
    assert begun.next_event() == 1.5
    begun.put(paused, -1.0)
    assert begun.is_lifted(paused), "another key takes nothing from it"
    begun.ran([paused])
    assert (order(begun), begun.key(paused)) == ([3, 0, 1, 2], -1.0)


def test_one_that_moves_stands_where_it_stood() -> None:
    """Its key, whether it is lifted, and when it is to be go with it; nothing of it is left."""
    begun, other = Begun(max_pause_s=1.0), Begun(max_pause_s=1.0)
    lifted, waiting = stream(0, 0.0), stream(1, 0.5)
    begun.put(lifted, 5.0)
    begun.put(waiting, 4.0)
    begun.lift_paused(1.0)
    for request in (lifted, waiting):
        other.restore(request, begun.take(request))
    assert (len(begun), list(begun), begun.next_event()) == (0, [], math.inf)
    assert (order(other), len(other), other.next_event()) == ([0, 1], 2, 1.5)
    other.ran([lifted])
    assert (order(other), other.key(lifted)) == ([1, 0], 5.0)
