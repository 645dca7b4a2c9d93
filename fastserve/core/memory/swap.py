"""Swapper: which Blocks move between the tiers, and when.

    claim, no place free      make_room   the coldest table gives way, from its tail on, by no more
                                          than is lacking: CLEAN Blocks go at once, DIRTY ones leave
    claim, KV on the host     bring_in    what is absent, and nothing that stayed
    the link has nothing      save_ahead  DIRTY Blocks, those first whose place is needed first: the
    else to do                            prefix cache from its oldest, then the coldest tables
                              fetch_ahead the warmest table that gave way, into places beyond what
                                          those that begin and grow are about to need

Rules: only full Blocks are saved ahead, for the others change. No more Blocks of a table are
fetched ahead after it gave way than it has; what was fetched is CLEAN, and goes again for nothing.
One that gave way takes the places of others again no sooner than `wait_s` says: its memory lies
idle while it is copied, and of the whole device a stated share may.
A link that takes no time has done each copy as it begins, and no plan carries it. Must not know:
the order of requests beyond which is colder, seats and tokens of a step, what a copy is made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import islice

from fastserve.core.memory.block import Block, State
from fastserve.core.memory.link import Link
from fastserve.core.memory.pool import BlockPool
from fastserve.core.memory.ranking import ColdnessOf, by_coldness
from fastserve.core.memory.table import BlockTable
from fastserve.core.messages import Copy, CopyDirection
from fastserve.core.request import Request

IN, OUT = CopyDirection.SWAP_IN, CopyDirection.SWAP_OUT
MIN_BLOCKS = 8  # that a table gives up at a time if they have to be copied
ARMED_SHARE = 0.2  # of the device: while more of it holds nothing, nothing is saved ahead
DEMAND_DECAY = 0.9  # of the mean number of places that a step takes
STEPS_AHEAD = 4  # whose demand is left alone by what is fetched ahead, or comes back
EXCHANGE_SHARE = 0.03  # of the device's memory, which may lie idle for those that come back
RANKED_PER_CALL = 32  # requests: a ranking of n serves for n / 32 calls


class Way(Enum):
    """How the next Block of a table that gives way would free its place."""

    AT_ONCE = auto()
    BY_COPY = auto()
    LATER = auto()  # the link has enough to do
    NO_HOST_PLACE = auto()
    NONE_LEFT = auto()


@dataclass(slots=True)
class Moves:
    """Blocks moved so far, requests that came back by it, and copies that failed."""

    num_swaps: int = 0
    num_swapped_out_blocks: int = 0
    num_swapped_in_blocks: int = 0
    num_saved_blocks: int = 0
    num_fetched_blocks: int = 0
    num_clean_blocks: int = 0
    num_failed_copies: int = 0


class Swapper:
    """Moves what claims need, and what will be needed, over one link.

    `window_s` is how much the link may have to do before DIRTY Blocks are left where they are, and
    about how long a copy ahead of need may take. `warmth` orders requests as coldness does.
    """

    def __init__(
        self,
        pool: BlockPool,
        link: Link,
        warmth: ColdnessOf,
        *,
        block_size: int,
        window_s: float,
        saves_ahead: bool,
        fetches_ahead: bool,
    ) -> None:
        self._pool = pool
        self.link = link
        self._warmth = warmth
        self._block_size = block_size
        self._window_s = window_s
        self._is_instant = link.copy_s(1) == 0.0
        self._saves_ahead = saves_ahead and not self._is_instant
        self._fetches_ahead = fetches_ahead and not self._is_instant
        self._max_ahead = self._most_blocks_within(window_s)
        self._ranked: list[Request] = []
        self._num_calls_left = 0
        self._num_taken = 0
        self._has_failed = False  # a copy to the host, since the last step
        self._demand = 0.0  # places that a step takes, a moving mean
        self.moves = Moves()

    def _most_blocks_within(self, seconds: float) -> int:
        num_blocks = 1
        while num_blocks < 2**16 and self.link.copy_s(2 * num_blocks) <= seconds:
            num_blocks *= 2
        return num_blocks

    # ── room for a claim ─────────────────────────────────────────────────────────────────────

    def way_out(self, table: BlockTable) -> Way:
        """Return how the next Block of a table that gives way would free its place."""
        if table.steps_in_flight:
            return Way.BY_COPY
        own = int(table.is_wanted)
        states = {block.state for block in table.blocks if block.wanted <= own}
        if State.CLEAN in states:
            return Way.AT_ONCE
        if State.SAVING not in states and State.DIRTY not in states:
            return Way.NONE_LEFT
        if table.is_stuck:  # even if another copy of it is under way: that may fail as well
            return Way.NO_HOST_PLACE
        if State.SAVING in states:
            return Way.BY_COPY
        if not self._pool.num_host_available:
            return Way.NO_HOST_PLACE
        is_busy = self.link.backlog_s(OUT) > self._window_s
        return Way.LATER if is_busy else Way.BY_COPY

    def make_room(self, table: BlockTable, num_computed_tokens: int, num_blocks: int) -> None:
        """Let an unwanted table give up places, from its tail on, now or when they are copied.

        What is on the host goes first, and at once.
        """
        pool = self._pool
        num_blocks -= self._give_back_empty(table, num_computed_tokens)
        free_to_go = [block for block in reversed(table.blocks) if not block.wanted]
        copied: list[Block] = []
        for block in free_to_go:
            if num_blocks <= 0:
                return
            if block.state is State.CLEAN:
                pool.drop(block)
                self.moves.num_clean_blocks += 1
            elif block.state is State.SAVING:
                pool.leave(block)
            else:
                continue
            num_blocks -= 1
        dirty = [block for block in free_to_go if block.state is State.DIRTY]
        num_copied = min(max(num_blocks, MIN_BLOCKS), len(dirty)) if num_blocks > 0 else 0
        for block in dirty[:num_copied]:
            if not pool.num_host_available:
                break
            pool.leave(block)
            copied.append(block)
        is_coming = any(block.state is State.LOADING for block in free_to_go)
        table.is_drained = len(copied) == len(dirty) and not is_coming
        if copied:
            self.moves.num_swapped_out_blocks += len(copied)
            self._begin(OUT, copied)

    def _give_back_empty(self, table: BlockTable, num_computed_tokens: int) -> int:
        """Release the Blocks behind all that is computed, and return how many."""
        num_full = -(-num_computed_tokens // self._block_size)
        empty = table.blocks[num_full:]
        del table.blocks[num_full:]
        for block in reversed(empty):
            self._pool.release(block)
        return len(empty)

    # ── back again ───────────────────────────────────────────────────────────────────────────

    def bring_in(self, table: BlockTable, absent: Sequence[Block]) -> None:
        """Load Blocks of a table for which there are places; those on their way out stay."""
        for block in table.blocks:
            if block.state is State.LEAVING:
                self._pool.stay(block)
        if absent:
            self._load_blocks(absent)
            table.num_loaded += len(absent)
            self.moves.num_swapped_in_blocks += len(absent)

    @property
    def num_reserved(self) -> int:
        """Places that those who begin and grow are about to need."""
        return round(STEPS_AHEAD * self._demand)

    def wait_s(self, num_absent: int) -> float:
        """Return how long a request stays away that lacks so many Blocks, unless there is room.

        Its memory lies idle while they are copied, and for about a step at the least. If all that
        is away came back as often as this says, so would EXCHANGE_SHARE of the device's memory.
        """
        if self._is_instant:
            return 0.0
        idle_s = self.link.copy_s(num_absent) + self._window_s
        return idle_s * self._pool.num_away / (EXCHANGE_SHARE * self._pool.device.num_blocks)

    def _load_blocks(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            self._pool.load(block)
        self._begin(IN, blocks)

    # ── ahead of need ────────────────────────────────────────────────────────────────────────

    def worked(self) -> None:
        """Note that a step is done, and take account of the places taken since the one before.

        Not where a plan is asked for: how often that is must not change what is planned.
        """
        self._has_failed = False
        self._demand = DEMAND_DECAY * self._demand + (1.0 - DEMAND_DECAY) * self._num_taken
        self._num_taken = 0

    def took(self, num_blocks: int) -> None:
        """Note that tables began or grew by so many Blocks."""
        self._num_taken += num_blocks

    def save_ahead(self, holders: Iterable[Request], now: float) -> None:
        """Copy to the host what is likely to lose its place first, if the link is idle."""
        pool = self._pool
        is_armed = pool.device.num_free < ARMED_SHARE * pool.device.num_blocks
        # What failed at once would fail again at once, for ever.
        if self._has_failed or not (self._saves_ahead and is_armed and self.link.is_idle(OUT)):
            return
        blocks: list[Block] = []
        for block in list(islice(pool.unsaved(), self._max_ahead)):
            if not pool.has_spare_host_place:
                break
            pool.save(block)
            blocks.append(block)
        if not blocks:
            self._save_tables(holders, now, blocks)
        if blocks:
            self.moves.num_saved_blocks += len(blocks)
            self._begin(OUT, blocks)

    def _save_tables(self, holders: Iterable[Request], now: float, blocks: list[Block]) -> None:
        """Add full Blocks of tables, those of the coldest from the tail on."""
        pool = self._pool
        for request in reversed(self._rank(holders, now)):
            table = request.table
            if table is None or table.num_saved == table.num_published:
                continue
            for block in reversed(table.blocks[: table.num_published]):
                if block.state is not State.DIRTY:
                    continue
                if len(blocks) == self._max_ahead or not pool.has_spare_host_place:
                    return
                pool.save(block)
                blocks.append(block)
            table.num_saved = table.num_published

    def fetch_ahead(self, away: Mapping[BlockTable, Request], num_left: int, now: float) -> None:
        """Copy back what the warmest of those lacks that gave way, if link and places are idle."""
        if not (self._fetches_ahead and away and self.link.is_idle(IN)):
            return
        num_blocks = min(num_left - self.num_reserved, self._max_ahead)
        if num_blocks <= 0:
            return
        waiting = [
            request
            for table, request in away.items()
            if not table.is_wanted and table.num_fetched < len(table.blocks)
        ]
        if not waiting:
            return
        warmest = min(waiting, key=by_coldness(self._warmth, now))
        table = warmest.table
        assert table is not None
        absent = table.on_host()
        num_blocks = min(num_blocks, len(table.blocks) - table.num_fetched)
        has_all = len(absent) <= num_blocks  # what goes again before it runs is not fetched again
        table.num_fetched += len(table.blocks) if has_all else num_blocks
        if absent:
            blocks = absent[:num_blocks]
            table.num_loaded += len(blocks)
            table.is_drained = False
            self.moves.num_fetched_blocks += len(blocks)
            self._load_blocks(blocks)

    def _rank(self, holders: Iterable[Request], now: float) -> list[Request]:
        """Return the holders of KV, coldest last."""
        self._num_calls_left -= 1
        if self._num_calls_left < 0:
            self._ranked = sorted(holders, key=by_coldness(self._warmth, now))
            self._num_calls_left = len(self._ranked) // RANKED_PER_CALL
        return self._ranked

    # ── copies ───────────────────────────────────────────────────────────────────────────────

    def _begin(self, direction: CopyDirection, blocks: Sequence[Block]) -> None:
        self.link.begin(direction, blocks)
        if self._is_instant:
            for copy in self.link.take():
                self.landed(copy.copy_id)

    def take(self) -> tuple[Copy, ...]:
        """Return the copies that no plan has carried yet."""
        return self.link.take()

    def landed(self, copy_id: int, *, has_failed: bool = False) -> Sequence[Block]:
        """Note that a copy was reported, and return what it was to move.

        Raises ValueError where none of that id is under way.
        """
        pool = self._pool
        direction, blocks, _ = self.link.landed(copy_id)
        self.moves.num_failed_copies += has_failed
        if direction is OUT:
            end = pool.save_failed if has_failed else pool.saved
            self._has_failed |= has_failed
        else:
            end = pool.load_failed if has_failed else pool.loaded
        for block in reversed(blocks):
            end(block)
        return blocks
