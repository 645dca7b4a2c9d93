"""The simulated link between device and host: how long copies take, and which are done.

Rules: its two directions do not slow each other down (full duplex); in each, a copy begins when the
one before it is done. Devices that share a model have a link each and copy their shards at the same
time: one link stands for all. Must not know: blocks, the order of requests, what a copy is for.
"""

from __future__ import annotations

from collections import deque
from math import inf

from fastserve.core.cost_model import CostModel
from fastserve.core.messages import Copy, CopyDirection


class Link:
    """Copies under way, by direction in the order in which they began."""

    def __init__(self, cost_model: CostModel) -> None:
        self._cost_model = cost_model
        self._under_way: dict[CopyDirection, deque[tuple[float, int]]] = {
            direction: deque() for direction in CopyDirection
        }
        self._free_at = dict.fromkeys(CopyDirection, 0.0)

    def begin(self, copy: Copy, now: float) -> tuple[float, float]:
        """Queue a copy behind those of its direction; return when it begins and when it ends."""
        direction = copy.direction
        begins_at = max(now, self._free_at[direction])
        ends_at = begins_at + self._cost_model.copy_s(len(copy.src))
        self._free_at[direction] = ends_at
        self._under_way[direction].append((ends_at, copy.copy_id))
        return begins_at, ends_at

    @property
    def next_end(self) -> float:
        """When the next copy is done; inf: none is under way."""
        return min((copies[0][0] for copies in self._under_way.values() if copies), default=inf)

    def ended(self, now: float) -> list[int]:
        """Take out the copies that are done by now."""
        done: list[int] = []
        for copies in self._under_way.values():
            while copies and copies[0][0] <= now:
                done.append(copies.popleft()[1])
        return done
