"""Link: the copies between the tiers that were planned and have not been reported.

Rules: each direction is a queue of its own. A copy is planned once, and reported once. Must not
know: whose Blocks move, or why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from fastserve.core.memory.block import Block
from fastserve.core.messages import Copy, CopyDirection


class Moving(NamedTuple):
    """What one copy moves, and how long it is expected to take on its own."""

    direction: CopyDirection
    blocks: Sequence[Block]
    copy_s: float


class Link:
    """`copy_s` says how long a copy of so many blocks takes."""

    def __init__(self, copy_s: Callable[[int], float]) -> None:
        self.copy_s = copy_s
        self._moving: dict[int, Moving] = {}
        self._planned: list[Copy] = []
        self._next_id = 0
        self._backlog_s = {CopyDirection.SWAP_OUT: 0.0, CopyDirection.SWAP_IN: 0.0}
        self._num = {CopyDirection.SWAP_OUT: 0, CopyDirection.SWAP_IN: 0}

    @property
    def num_copies(self) -> int:
        """Copies that are planned or under way."""
        return len(self._moving)

    def is_idle(self, direction: CopyDirection) -> bool:
        """Whether nothing is to be copied this way."""
        return not self._num[direction]

    def backlog_s(self, direction: CopyDirection) -> float:
        """Return the seconds that all copies of a direction take that were not reported yet."""
        return self._backlog_s[direction]

    def begin(self, direction: CopyDirection, blocks: Sequence[Block]) -> None:
        """Plan one copy; the Blocks have a place on both tiers."""
        device, host = tuple([b.device_id for b in blocks]), tuple([b.host_id for b in blocks])
        source, target = (host, device) if direction is CopyDirection.SWAP_IN else (device, host)
        copy_s = self.copy_s(len(blocks))
        self._planned.append(Copy(self._next_id, direction, source, target))
        self._moving[self._next_id] = Moving(direction, blocks, copy_s)
        self._next_id += 1
        self._num[direction] += 1
        self._backlog_s[direction] += copy_s

    def take(self) -> tuple[Copy, ...]:
        """Return the copies that no plan has carried yet."""
        planned, self._planned = tuple(self._planned), []
        return planned

    def landed(self, copy_id: int) -> Moving:
        """Forget a copy that was reported. Raises ValueError where it is not under way."""
        moving = self._moving.pop(copy_id, None)
        if moving is None:
            raise ValueError(f"copy {copy_id} is done, and no plan began it")
        self._num[moving.direction] -= 1
        if self._num[moving.direction]:
            self._backlog_s[moving.direction] -= moving.copy_s
        else:
            self._backlog_s[moving.direction] = 0.0
        return moving

    def blocks(self) -> Iterable[Block]:
        """Return what is under way."""
        return [block for moving in self._moving.values() for block in moving.blocks]
