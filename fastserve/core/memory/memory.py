"""KVCacheManager: which Blocks hold the KV of which request, and which claims on them are met.

    tokens of a request   0          start       computed     scheduled      end
    KV                    │  cached  │  computed │ in flight  │   claimed    │
    blocks of its table   [ shared, full ][ its own: full, then a tail with room ][ empty ]
                            └ findable as prefix ┘

    a claim    probe     the cached beginning, found and not touched
                 │
               claim     seat and blocks there ──► MET, the table begins or grows
                 │       short ──► victims (coldest first, if the eviction part lets it) ──► again
                 │                 none: STANDS, later claims of this plan do not get these blocks
                 │                 not allowed: DEFERRED, as if never asked
               advance   a step's tokens are computed; full Blocks become findable
                 │
               release   at the end of a request or of its epoch (evicted): the table is closed
                 │
               landed    the last step in flight that touches it is done: the Blocks go back

Rules: the only writer of a request's `table` and `num_computed_tokens`; epochs begin and end
here. A closed table keeps its Blocks while steps that touch it are in flight, so no
place is reused under a running kernel. Only full Blocks are shared; a partial tail is recomputed,
so nothing is ever copied on write. A claim that is not met and had no victim changes nothing but
what later claims of the same plan get. Must not know: the order of requests, budgets of tokens,
tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from enum import Enum, auto

from fastserve.core.memory.block import Block, BlockPool
from fastserve.core.memory.eviction import Eviction
from fastserve.core.memory.table import BlockTable
from fastserve.core.memory.victims import VictimRanking
from fastserve.core.request import Request


class Claim(Enum):
    """What became of a claim."""

    MET = auto()
    STANDS = auto()
    DEFERRED = auto()


class KVCacheManager:
    """Tables over one pool; at most `max_tables` requests hold KV at a time.

    `num_resident_blocks` bounds what the requests of one step hold together, where the pool is
    larger than the device: KV then moves at once and for nothing.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        victims: VictimRanking,
        eviction: Eviction,
        *,
        max_tables: int | None = None,
        num_resident_blocks: int | None = None,
        enable_prefix_caching: bool = False,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.num_resident_blocks = num_resident_blocks
        self._victims = victims
        self._eviction = eviction
        self._max_tables = max_tables
        self._enable_prefix_caching = enable_prefix_caching
        self._tables: dict[BlockTable, Request] = {}
        self._num_leaving = 0
        self._num_closed = 0
        self._num_standing = 0

    # ── what there is ────────────────────────────────────────────────────────────────────────

    @property
    def num_left(self) -> int:
        """Blocks that can be taken now, less those of claims of this plan that are not met."""
        return self.pool.num_available - self._num_standing

    @property
    def num_leaving(self) -> int:
        """Blocks of closed tables that wait for steps in flight.

        One that another table shares counts too, though its place does not come free. A claim may
        evict too little then; it stands, and is made again when the steps have landed.
        """
        return self._num_leaving

    @property
    def num_tables(self) -> int:
        """Requests that hold KV."""
        return len(self._tables) - self._num_closed

    def holders(self) -> Iterator[Request]:
        """Yield the requests that hold KV."""
        return (request for table, request in self._tables.items() if not table.is_closed)

    def probe(self, request: Request) -> int:
        """Return the tokens whose KV a request without any would find; nothing is touched."""
        return len(self._find_prefix(request)) * self.block_size

    # ── claims of one plan ───────────────────────────────────────────────────────────────────

    def begin_plan(self, now: float) -> None:
        """Forget the claims of the last plan that were not met."""
        self._num_standing = 0
        self._victims.begin_plan(now)

    def claim(self, request: Request, end: int, scanned: Collection[int]) -> Claim:
        """Have a request hold Blocks for its positions below `end`; others may lose theirs.

        A request without KV begins with the Blocks that already hold its beginning, and to get
        beyond where it was before it lost its KV. `scanned` are the handles that this plan has
        looked at, the request's included: nothing is taken from them.
        """
        table = request.table
        if table is None:
            return self._claim_first(request, end, scanned)
        num_new = -(-end // self.block_size) - len(table.blocks)
        if num_new <= 0:
            return Claim.MET
        claim = self._make_room(request, (), num_new, scanned)
        if claim is Claim.MET:
            self._grow(table, num_new)
        return claim

    def _claim_first(self, request: Request, end: int, scanned: Collection[int]) -> Claim:
        prefix = self._find_prefix(request)
        lost = min(request.num_lost_tokens + 1, request.num_tokens)
        num_new = -(-max(end, lost) // self.block_size) - len(prefix)
        claim = self._make_room(request, prefix, num_new, scanned)
        if claim is Claim.MET:
            # Before any is taken: they may be the next that the pool would give up.
            for block in prefix:
                self.pool.retain(block)
            table = BlockTable(prefix)
            self._grow(table, num_new)
            self._tables[table] = request
            request.begin(table, table.num_published * self.block_size)
        return claim

    def _make_room(
        self, request: Request, prefix: Collection[Block], num_new: int, scanned: Collection[int]
    ) -> Claim:
        """Evict until a claim can be met; what it takes to meet it stands if it cannot."""
        has_taken = False
        while True:
            has_seat = request.table is not None or self._has_seat
            # What no table names counts as available until it is retained.
            num_blocks = num_new + sum(not block.refs for block in prefix)
            num_left = self.num_left
            if has_seat and num_blocks <= num_left + self._num_leaving:
                break
            victim = self._victims.find(request, scanned, self.holders())
            if victim is None:
                break
            if not has_taken and not self._eviction.may_take(victim, request):
                return Claim.DEFERRED
            has_taken = True
            self._evict(victim)
        if has_seat and num_blocks <= num_left:
            return Claim.MET
        if has_seat:
            self._num_standing += num_blocks
        return Claim.STANDS

    @property
    def _has_seat(self) -> bool:
        return self._max_tables is None or self.num_tables < self._max_tables

    def _evict(self, victim: Request) -> None:
        self._eviction.took(victim)
        self.release(victim)
        victim.restart()

    def _grow(self, table: BlockTable, num_blocks: int) -> None:
        for _ in range(num_blocks):
            table.blocks.append(self.pool.take())

    def _find_prefix(self, request: Request) -> list[Block]:
        """Find the longest cached beginning of a request.

        At least one known token is left to compute: its logits are needed. A request that wants
        its prompt scored has to compute all of it.
        """
        if not self._enable_prefix_caching or request.params.prompt_logprobs is not None:
            return []
        blocks: list[Block] = []
        for index in range((request.num_tokens - 1) // self.block_size):
            block = self.pool.find(request.block_hash(index, self.block_size))
            if block is None:
                break
            blocks.append(block)
        return blocks

    # ── facts ────────────────────────────────────────────────────────────────────────────────

    def advance(self, request: Request, table: BlockTable, end: int) -> None:
        """Confirm the KV of a request's positions below `end`; full Blocks become findable."""
        request.num_computed_tokens = end
        num_full = end // self.block_size
        if num_full <= table.num_published:
            return
        if self._enable_prefix_caching:
            request.block_hash(num_full - 1, self.block_size)  # and all before it
            for index in range(table.num_published, num_full):
                self.pool.publish(table.blocks[index], request.block_hashes[index])
        table.num_published = num_full

    def worked(self, device_s: float) -> None:
        """Note the device seconds of a step that is done."""
        self._eviction.worked(device_s)

    def release(self, request: Request) -> None:
        """Take its KV from a request, if it holds any; nothing reads it but steps in flight."""
        table, request.table = request.table, None
        if table is None:
            return
        table.is_closed = True
        if table.steps_in_flight:
            self._num_leaving += len(table.blocks)
            self._num_closed += 1
        else:
            self._give_back(table)

    def landed(self, table: BlockTable) -> None:
        """Give the Blocks of a closed table back if the step that is done was its last."""
        if not table.steps_in_flight:
            self._num_leaving -= len(table.blocks)
            self._num_closed -= 1
            self._give_back(table)

    def _give_back(self, table: BlockTable) -> None:
        del self._tables[table]
        # The tail goes first: the head of a prefix is the part that others can share.
        for block in reversed(table.blocks):
            self.pool.release(block)

    # ── for tests ────────────────────────────────────────────────────────────────────────────

    def check(self, live: Iterable[Request]) -> None:
        """Assert that the tables are exactly those of live requests and those still in flight."""
        self.pool.check()
        held = {request.table: request for request in live if request.table is not None}
        closed = [table for table in self._tables if table.is_closed]
        kept = {table: request for table, request in self._tables.items() if not table.is_closed}
        assert kept == held, "a table has no owner, or a request a table that is not kept"
        assert all(table.steps_in_flight > 0 for table in closed), "a closed table was not released"
        assert self._num_closed == len(closed)
        assert self._num_leaving == sum(len(table.blocks) for table in closed)
        assert self._max_tables is None or len(held) <= self._max_tables
        refs: dict[Block, int] = {}
        for table, request in self._tables.items():
            assert len(set(table.blocks)) == len(table.blocks)
            assert table.is_closed or table.num_published <= len(table.blocks)
            assert table.is_closed or request.num_computed_tokens <= (
                len(table.blocks) * self.block_size
            )
            for block in table.blocks:
                refs[block] = refs.get(block, 0) + 1
        assert all(block.refs == count for block, count in refs.items())
        assert len(refs) == self.pool.num_used
