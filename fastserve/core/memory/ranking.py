"""Ranking: who is colder than whom; of the equally cold the youngest, for it has waited least.

Rules: the one order in which KV is taken, saved and, from its other end, fetched. Must not know:
what is done with it.
"""

from __future__ import annotations

from collections.abc import Callable

from fastserve.core.policies.protocol import Coldness
from fastserve.core.request import Request

ColdnessOf = Callable[[Request, float], Coldness]


def by_coldness(coldness: ColdnessOf, now: float) -> Callable[[Request], Coldness]:
    """Return a key that sorts requests, the coldest last."""
    return lambda request: (*coldness(request, now), request.handle)
