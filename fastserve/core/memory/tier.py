"""Tier: the account of one tier: which places are free, and which hold what nobody needs.

Rules: free + cached + moving + used = total, always. What is cached is named by no table and read
or written by no copy; its places can be had at once, those of the least recently used first. Must
not know: which of the tiers it is, what a Block goes through, when a copy is done.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from fastserve.core.memory.block import Block
from fastserve.core.memory.places import Places


class Tier(Places):
    """`num_moving` places are written by a copy, or held by one beyond the need of any table."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        # A plain dict is slow to give up its first key.
        self._cached: OrderedDict[Block, None] = OrderedDict()
        self.num_moving = 0

    @property
    def num_blocks(self) -> int:
        """All places."""
        return self.total

    @property
    def num_cached(self) -> int:
        """Places that hold a Block which no table names, and no copy touches."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Places that can be had without taking any from a table."""
        return self.num_free + len(self._cached)

    @property
    def num_used(self) -> int:
        """Places that hold a Block which some table names."""
        return self.total - self.num_available - self.num_moving

    # ── what nobody needs ────────────────────────────────────────────────────────────────────

    def keep(self, block: Block, *, is_old: bool = False) -> None:
        """Have a Block be the last to go, or the first where it `is_old`."""
        self._cached[block] = None
        if is_old:
            self._cached.move_to_end(block, last=False)

    def need(self, block: Block) -> None:
        """Have a Block not go that was kept, if it was."""
        self._cached.pop(block, None)

    @property
    def oldest(self) -> Block | None:
        """The Block that is the next to go."""
        return next(iter(self._cached), None)

    def displace(self) -> Block:
        """Return the oldest Block, which is not kept any more; the caller has seen that one is."""
        return self._cached.popitem(last=False)[0]

    def kept(self) -> Collection[Block]:
        """Return what is kept, the next to go first."""
        return self._cached.keys()

    # ── for tests ────────────────────────────────────────────────────────────────────────────

    def check_account(self, taken: Sequence[int], kept: Collection[Block], num_moving: int) -> None:
        """Assert that these places are taken, each of them once, and these Blocks are kept."""
        self.check(taken)
        assert self._cached.keys() == set(kept)
        assert self.num_moving == num_moving
