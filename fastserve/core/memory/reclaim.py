"""Reclaimer: takes places from others until a claim can be met, by no more than it lacks.

Rules: an earlier claim of a plan comes before a later one, met or not: what it lacks stands, and is
not left for others. A claim that found no victim changes nothing but that. While what a claim lacks
is on its way, it takes what no request runs on and is free at once instead. Must not know: what is
claimed, what a prefix is, which Block of a victim goes first.
"""

from __future__ import annotations

from collections.abc import Collection

from fastserve.core.memory.block import Block, State
from fastserve.core.memory.claim import Claim
from fastserve.core.memory.eviction import Eviction, Verdict
from fastserve.core.memory.pool import BlockPool
from fastserve.core.memory.swap import Swapper, Way
from fastserve.core.memory.table import BlockTable
from fastserve.core.memory.tables import Tables
from fastserve.core.memory.victims import VictimRanking
from fastserve.core.request import Request


class Reclaimer:
    """The places that claims of one plan can have: what is left, and what others give up."""

    def __init__(
        self,
        pool: BlockPool,
        tables: Tables,
        victims: VictimRanking,
        eviction: Eviction,
        swapper: Swapper | None,
    ) -> None:
        self._pool = pool
        self._device = pool.device
        self._tables = tables
        self._victims = victims
        self._eviction = eviction
        self._swapper = swapper
        self._num_standing = 0

    @property
    def num_left(self) -> int:
        """Blocks that can be taken now, less those of claims of this plan that are not met."""
        return self._device.num_available - self._num_standing

    @property
    def num_leaving(self) -> int:
        """Blocks that wait for steps and copies in flight.

        One that another table shares counts too, though its place does not come free. A claim may
        take too little then; it stands, and is made again when the steps have landed.
        """
        return self._tables.num_leaving + self._pool.num_leaving

    def begin_plan(self, now: float) -> None:
        """Forget the claims of the last plan that were not met."""
        self._num_standing = 0
        self._victims.begin_plan(now)
        self._reconsider()

    def serve(self, num_blocks: int) -> None:
        """Note that a claim that stands gets so many of the places that it lacks."""
        self._num_standing -= num_blocks

    def make_room(
        self, request: Request, prefix: Collection[Block], num_new: int, scanned: Collection[int]
    ) -> Claim:
        """Have others give way until a claim can be met; what it lacks stands if it cannot.

        It is for a table that begins with a `prefix`, if it begins, and for new Blocks.
        """
        has_taken = False
        while True:
            has_seat = request.table is not None or self._tables.has_seat
            num_blocks = num_taken(prefix, num_new)
            if has_seat and num_blocks <= self.num_left:
                return Claim.MET
            is_coming = has_seat and num_blocks <= self.num_left + self.num_leaving
            found = self._find_victim(request, scanned, has_seat=has_seat, is_coming=is_coming)
            if found is None:
                break
            victim, way = found
            can_swap = way is not Way.NO_HOST_PLACE
            verdict = Verdict.DROP  # a claim that has taken KV takes what it lacks
            if can_swap or not has_taken:
                verdict = self._eviction.judge(victim, request, can_swap=can_swap)
            if verdict is Verdict.KEEP:
                return Claim.DEFERRED
            has_taken = True
            if verdict is Verdict.DROP:
                self._drop(victim)
            else:
                num_awaited = 0 if is_coming else self.num_leaving
                self.give_way(victim, num_blocks - self.num_left - num_awaited)
        if has_seat:
            self._num_standing += num_blocks
        return Claim.STANDS

    def give_way(self, victim: Request, num_blocks: int) -> None:
        """Have a request give up places on the device, as soon as no step touches them."""
        table = victim.table
        assert table is not None
        assert self._swapper is not None
        if self._tables.give_way(victim, table):
            self._swapper.make_room(table, victim.num_computed_tokens, num_blocks)

    def _drop(self, victim: Request) -> None:
        self._eviction.dropped(victim)
        self._tables.restart(victim)

    # ── victims ──────────────────────────────────────────────────────────────────────────────

    def _find_victim(
        self, request: Request, scanned: Collection[int], *, has_seat: bool, is_coming: bool
    ) -> tuple[Request, Way] | None:
        """Return the request that is to give way, and how; None: no one, or not now.

        Where all that is lacking `is_coming`, only what no request runs on and is free at once is
        taken instead.
        """
        if is_coming and not self._pool.num_unwanted:
            return None
        while (victim := self._coldest(request, scanned)) is not None:
            table = victim.table
            assert table is not None
            way = self._way_out(table) if has_seat else Way.NO_HOST_PLACE
            if way is Way.NONE_LEFT and not table.is_wanted:
                self._victims.pass_over(victim)
                continue
            is_too_dear = is_coming and (table.is_wanted or way is not Way.AT_ONCE)
            return None if way is Way.LATER or is_too_dear else (victim, way)
        return None

    def _coldest(self, request: Request, scanned: Collection[int]) -> Request | None:
        victim = self._victims.find(request, scanned, self._tables.holders())
        if victim is None and self._reconsider():
            victim = self._victims.find(request, scanned, self._tables.holders())
        return victim

    def _reconsider(self) -> bool:
        """Let those be victims again of whom others have let go since; return whether any may."""
        if not self._tables.reconsider():
            return False
        self._victims.reconsider()
        return True

    def _way_out(self, table: BlockTable) -> Way:
        return Way.NO_HOST_PLACE if self._swapper is None else self._swapper.way_out(table)


def num_taken(prefix: Collection[Block], num_new: int) -> int:
    """Return how many fewer Blocks can be had once a table begins with these and new ones."""
    # What no table names counts as available until it is retained.
    return num_new + sum(
        block.state is State.HOST or not (block.refs or block.is_moving) for block in prefix
    )
