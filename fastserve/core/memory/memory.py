"""KVCacheManager: which Blocks hold the KV of which request, and which claims on them are met.

    tokens of a request   0          start       computed     scheduled      end
    KV                    │  cached  │  computed │ in flight  │   claimed    │
    blocks of its table   [ shared, full ][ its own: full, then a tail with room ][ empty ]
                            └ findable as prefix ┘

Rules: the only writer of a request's `num_computed_tokens`. A claim that is not met and had no
victim changes nothing but what later claims of the same plan get, and where its own KV is. One that
gave way comes back into places that no request runs on; into those of others only after a wait.
Must not know: the order of requests, budgets of tokens, tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from fastserve.core.memory.block import ON_DEVICE, Block, State
from fastserve.core.memory.claim import Claim
from fastserve.core.memory.eviction import Eviction
from fastserve.core.memory.pool import BlockPool
from fastserve.core.memory.prefix import PrefixCache
from fastserve.core.memory.reclaim import Reclaimer, num_taken
from fastserve.core.memory.swap import Moves, Swapper
from fastserve.core.memory.table import BlockTable
from fastserve.core.memory.tables import Tables
from fastserve.core.memory.victims import VictimRanking
from fastserve.core.messages import Copy
from fastserve.core.request import Request


class KVCacheManager:
    """Tables over one pool; at most `max_tables` requests hold KV at a time.

    Where there is a `swapper` they hold it on two tiers. `is_worth_loading` says whether so many
    cached Blocks that only the host has are sooner loaded than computed.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        victims: VictimRanking,
        eviction: Eviction,
        *,
        swapper: Swapper | None = None,
        is_worth_loading: Callable[[int], bool] = lambda num_blocks: True,
        max_tables: int | None = None,
        enable_prefix_caching: bool = False,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self._prefixes = PrefixCache(
            pool, block_size, is_worth_loading, is_enabled=enable_prefix_caching
        )
        self._tables = Tables(pool, block_size, max_tables)
        self._reclaimer = Reclaimer(pool, self._tables, victims, eviction, swapper)
        self._eviction = eviction
        self._swapper = swapper
        self._now = 0.0

    # ── what there is ────────────────────────────────────────────────────────────────────────

    @property
    def num_left(self) -> int:
        """Blocks that can be taken now, less those of claims of this plan that are not met."""
        return self._reclaimer.num_left

    @property
    def num_leaving(self) -> int:
        """Blocks that wait for steps and copies in flight."""
        return self._reclaimer.num_leaving

    @property
    def num_tables(self) -> int:
        """Requests that hold KV."""
        return self._tables.num_open

    @property
    def num_copies(self) -> int:
        """Copies that are planned or under way."""
        return 0 if self._swapper is None else self._swapper.link.num_copies

    @property
    def moves(self) -> Moves:
        """What was moved so far."""
        return Moves() if self._swapper is None else self._swapper.moves

    def holders(self) -> Iterator[Request]:
        """Yield the requests that hold KV."""
        return self._tables.holders()

    def residents(self) -> Iterator[Request]:
        """Yield those whose KV is all on the device at their turn, in the order of `holders`."""
        return self._tables.residents()

    def probe(self, request: Request) -> int:
        """Return the tokens whose KV a request without any would find; nothing is touched."""
        return len(self._prefixes.find(request)) * self.block_size

    # ── claims of one plan ───────────────────────────────────────────────────────────────────

    def begin_plan(self, now: float) -> None:
        """Forget the claims of the last plan that were not met."""
        self._now = now
        self._reclaimer.begin_plan(now)

    def claim(
        self,
        request: Request,
        end: int,
        scanned: Collection[int],
        *,
        num_spare: int = 0,
        is_patient: bool = True,
    ) -> Claim:
        """Have a request hold Blocks for its positions below `end`; others may lose theirs.

        A request without KV begins with the Blocks that already hold its beginning, and to get
        beyond where it was before it lost its KV; it is deferred where it would leave less than
        `num_spare`. `scanned` are the handles that this plan has looked at, the request's included:
        nothing is taken from them. One that gave way is deferred where it would take the places of
        others too soon, if it `is_patient`.
        """
        table = request.table
        if table is None:
            return self._claim_first(request, end, scanned, num_spare)
        num_new = -(-end // self.block_size) - len(table.blocks)
        if not table.is_resident:
            return self._claim_back(request, table, end, scanned, is_patient=is_patient)
        if num_new <= 0:
            return Claim.MET
        claim = self._reclaimer.make_room(request, (), num_new, scanned)
        if claim is Claim.MET:
            self._grow(table, num_new)
        return claim

    def _claim_first(
        self, request: Request, end: int, scanned: Collection[int], num_spare: int
    ) -> Claim:
        prefix = self._prefixes.find(request)
        lost = min(request.num_lost_tokens + 1, request.num_tokens)
        num_new = -(-max(end, lost) // self.block_size) - len(prefix)
        if num_spare and num_taken(prefix, num_new) + num_spare > self.num_left:
            return Claim.DEFERRED
        claim = self._reclaimer.make_room(request, prefix, num_new, scanned)
        if claim is not Claim.MET:
            return claim
        if any(block.state is State.GONE for block in prefix):
            # It made room for another.
            return self._claim_first(request, end, scanned, num_spare)
        absent = [block for block in prefix if block.state is State.HOST]
        # Before any is taken: these may be the next that the pool would give up.
        table = self._tables.open(request, prefix)
        if absent or any(block.state not in ON_DEVICE for block in prefix):
            return self._begin_away(request, table, absent, num_new)
        self._grow(table, num_new)
        return claim

    def _begin_away(
        self, request: Request, table: BlockTable, absent: Sequence[Block], num_new: int
    ) -> Claim:
        """Bring a cached beginning in from the host."""
        assert self._swapper is not None
        self._tables.begin_away(request, table, self._now)
        self._swapper.bring_in(table, absent)
        self._grow(table, num_new)
        return self._settle(request, table)

    def _claim_back(
        self,
        request: Request,
        table: BlockTable,
        end: int,
        scanned: Collection[int],
        *,
        is_patient: bool,
    ) -> Claim:
        """Bring back what of a table has gone; places come as they become free."""
        if table.waits_since is not None and self._settle(request, table) is Claim.MET:
            return self.claim(request, end, scanned)
        if self._is_behind(table):
            return Claim.STANDS
        assert self._swapper is not None
        absent = table.on_host()
        num_new = max(-(-end // self.block_size) - len(table.blocks), 0)
        num_lacking = len(absent) + num_new
        if is_patient and table.waits_since is None:
            num_own = len(table.blocks) - len(absent)
            is_early = self._now - request.last_ran_at < self._swapper.wait_s(len(absent))
            if is_early and not self._has_room(num_lacking, num_own):
                return Claim.DEFERRED
        self._tables.want(table, self._now)
        claim = self._reclaimer.make_room(request, (), num_lacking, scanned)
        num_in = len(absent)
        if claim is not Claim.MET:
            # It stands for all of them already, and what is there now need not wait.
            num_in = max(min(num_in, self.num_left + num_lacking), 0)
            self._reclaimer.serve(num_in)
        self._swapper.bring_in(table, absent[:num_in])
        if claim is Claim.MET:
            self._grow(table, num_new)
            return self._settle(request, table)
        return claim

    def _has_room(self, num_blocks: int, num_own: int) -> bool:
        """Whether so many places are unused, beyond those that others are about to need."""
        assert self._swapper is not None
        num_unused = self.num_left + self.num_leaving + self.pool.num_unwanted - num_own
        return not num_blocks or num_blocks + self._swapper.num_reserved <= num_unused

    def _is_behind(self, table: BlockTable) -> bool:
        """Whether an earlier claim waits for places, and this one would get none or take those."""
        if self.num_left >= 0:
            return False
        is_short = self.num_left + self.num_leaving < 0
        return is_short or any(block.state is State.LEAVING for block in table.blocks)

    def _settle(self, request: Request, table: BlockTable) -> Claim:
        """Let a table run that is all on the device; until then its claim stands."""
        tail = table.blocks[request.num_computed_tokens // self.block_size :]
        # What is still written must not be read by a copy meanwhile.
        if not table.is_on_device or any(block.is_moving for block in tail):
            return Claim.STANDS
        assert table.waits_since is not None
        request.swap_s += self._now - table.waits_since
        self._tables.settle(table)
        if table.num_loaded:
            assert self._swapper is not None
            request.num_swaps += 1
            self._swapper.moves.num_swaps += 1
            table.num_loaded = 0
            table.is_stuck = False
        table.num_fetched = 0
        for block in tail:
            if block.state is State.CLEAN:
                self.pool.forget_host(block)
        return Claim.MET

    def _grow(self, table: BlockTable, num_blocks: int) -> None:
        for _ in range(num_blocks):
            table.blocks.append(self.pool.take())
        if self._swapper is not None:
            self._swapper.took(num_blocks)

    # ── copies ───────────────────────────────────────────────────────────────────────────────

    def copies(self, now: float) -> tuple[Copy, ...]:
        """Return the copies to begin: those of claims, then those ahead of need."""
        swapper, tables = self._swapper, self._tables
        if swapper is None:
            return ()
        if not tables.is_empty:
            swapper.save_ahead(tables.holders(), now)
            swapper.fetch_ahead(tables.away, self.num_left, now)
        return swapper.take()

    def copied(self, copy_id: int, *, has_failed: bool = False) -> None:
        """Note that a copy was reported. Raises ValueError where none of that id is under way."""
        if self._swapper is None:
            raise ValueError(f"copy {copy_id} is done, and no plan began it")
        blocks = self._swapper.landed(copy_id, has_failed=has_failed)
        if has_failed:
            self._tables.copy_failed(blocks)

    # ── facts ────────────────────────────────────────────────────────────────────────────────

    def advance(self, request: Request, table: BlockTable, end: int) -> None:
        """Confirm the KV of a request's positions below `end`; full Blocks become findable."""
        request.num_computed_tokens = end
        num_full = end // self.block_size
        if num_full > table.num_published:
            self._prefixes.publish(request, table, num_full)

    def distrust(self, request: Request) -> None:
        """Let nothing of a request be found as a prefix any more: its KV may be no numbers."""
        self._prefixes.distrust(request)

    def worked(self, device_s: float) -> None:
        """Note the device seconds of a step that is done."""
        self._eviction.worked(device_s)
        if self._swapper is not None:
            self._swapper.worked()

    def release(self, request: Request) -> None:
        """Take its KV from a request, if it holds any; nothing reads it but steps in flight."""
        self._tables.close(request)

    def landed(self, table: BlockTable) -> None:
        """Let the Blocks of a table go that is closed or draining if the step was its last."""
        self._tables.landed(table)

    # ── for tests ────────────────────────────────────────────────────────────────────────────

    def check(self, live: Iterable[Request]) -> None:
        """Assert what pool and tables promise, and that no Block is under two copies."""
        copied = () if self._swapper is None else tuple(self._swapper.link.blocks())
        assert len(set(copied)) == len(copied), "a block is under two copies"
        self.pool.check(self._tables.blocks(), copied)
        self._tables.check(live)
