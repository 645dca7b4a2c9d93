"""KVCacheManager: which Blocks hold the KV of which request, and which claims on them are met.

    tokens of a request   0          start       computed     scheduled      end
    KV                    │  cached  │  computed │ in flight  │   claimed    │
    blocks of its table   [ shared, full ][ its own: full, then a tail with room ][ empty ]
                            └ findable as prefix ┘

    a claim    probe     the cached beginning, found and not touched
                 │
               claim     all on the device ──► MET, the table begins or grows
                 │       on the host ──► is brought in; STANDS until it is there
                 │       short ──► victims (coldest first) give way: swapped, or dropped ──► again
                 │                 none: STANDS, later claims of this plan do not get these blocks
                 │                 not allowed, or back too soon: DEFERRED, as if never asked
               advance   a step's tokens are computed; full Blocks become findable
                 │
               release   at the end of a request or of its epoch (dropped): the table is closed
                 │
               landed    the last step in flight that touches it is done: the Blocks go back

Rules: the only writer of a request's `table` and `num_computed_tokens`; epochs begin and end
here. A closed table keeps its Blocks while steps that touch it are in flight, and so does one that
gives way, so no place is reused under a running kernel. Only full Blocks are shared; a partial tail
is recomputed, so nothing is ever copied on write. A claim that is not met and had no victim changes
nothing but what later claims of the same plan get, and where its own KV is. One that gave way comes
back into places that no request runs on; into those of others only after a wait. Must not know: the
order of requests, budgets of tokens, tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from enum import Enum, auto

from fastserve.core.memory.block import ON_DEVICE, Block, State
from fastserve.core.memory.eviction import Eviction, Verdict
from fastserve.core.memory.pool import BlockPool
from fastserve.core.memory.swap import Moves, Swapper, Way
from fastserve.core.memory.table import BlockTable
from fastserve.core.memory.victims import VictimRanking
from fastserve.core.messages import Copy
from fastserve.core.request import Request


class Claim(Enum):
    """What became of a claim."""

    MET = auto()
    STANDS = auto()
    DEFERRED = auto()


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
        self._victims = victims
        self._eviction = eviction
        self._swapper = swapper
        self._is_worth_loading = is_worth_loading
        self._max_tables = max_tables
        self._enable_prefix_caching = enable_prefix_caching
        self._tables: dict[BlockTable, Request] = {}
        self._away: dict[BlockTable, Request] = {}  # not resident
        self._draining: dict[BlockTable, int] = {}  # → places that become free
        self._num_leaving = 0  # of closed and draining tables
        self._num_closed = 0
        self._num_standing = 0
        self._has_let_go = False  # of a Block that others name and none wants
        self._now = 0.0

    # ── what there is ────────────────────────────────────────────────────────────────────────

    @property
    def num_left(self) -> int:
        """Blocks that can be taken now, less those of claims of this plan that are not met."""
        return self.pool.num_available - self._num_standing

    @property
    def num_leaving(self) -> int:
        """Blocks that wait for steps and copies in flight.

        One that another table shares counts too, though its place does not come free. A claim may
        evict too little then; it stands, and is made again when the steps have landed.
        """
        return self._num_leaving + self.pool.num_leaving

    @property
    def num_tables(self) -> int:
        """Requests that hold KV."""
        return len(self._tables) - self._num_closed

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
        return (request for table, request in self._tables.items() if not table.is_closed)

    def probe(self, request: Request) -> int:
        """Return the tokens whose KV a request without any would find; nothing is touched."""
        return len(self._find_prefix(request)) * self.block_size

    # ── claims of one plan ───────────────────────────────────────────────────────────────────

    def begin_plan(self, now: float) -> None:
        """Forget the claims of the last plan that were not met."""
        self._now = now
        self._num_standing = 0
        self._victims.begin_plan(now)
        self._reconsider()

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
        claim = self._make_room(request, (), num_new, scanned)
        if claim is Claim.MET:
            self._grow(table, num_new)
        return claim

    def _claim_first(
        self, request: Request, end: int, scanned: Collection[int], num_spare: int
    ) -> Claim:
        prefix = self._find_prefix(request)
        lost = min(request.num_lost_tokens + 1, request.num_tokens)
        num_new = -(-max(end, lost) // self.block_size) - len(prefix)
        if num_spare and self._num_taken(prefix, num_new) + num_spare > self.num_left:
            return Claim.DEFERRED
        claim = self._make_room(request, prefix, num_new, scanned)
        if claim is not Claim.MET:
            return claim
        if any(block.state is State.GONE for block in prefix):
            # It made room for another.
            return self._claim_first(request, end, scanned, num_spare)
        absent = [block for block in prefix if block.state is State.HOST]
        # Before any is taken: they may be the next that the pool would give up.
        for block in prefix:
            self.pool.retain(block)
            self.pool.want(block)
        table = BlockTable(prefix)
        self._tables[table] = request
        request.begin(table, table.num_published * self.block_size)
        if absent or any(block.state not in ON_DEVICE for block in prefix):
            return self._begin_away(request, table, absent, num_new)
        self._grow(table, num_new)
        return claim

    def _begin_away(
        self, request: Request, table: BlockTable, absent: Sequence[Block], num_new: int
    ) -> Claim:
        """Bring a cached beginning in from the host."""
        assert self._swapper is not None
        table.is_resident = False
        table.waits_since = self._now
        self._away[table] = request
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
        self._want(table)
        claim = self._make_room(request, (), num_lacking, scanned)
        num_in = len(absent)
        if claim is not Claim.MET:
            # It stands for all of them already, and what is there now need not wait.
            num_in = max(min(num_in, self.num_left + num_lacking), 0)
            self._num_standing -= num_in
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
        del self._away[table]
        table.is_resident = True
        table.num_sent = 0  # its places are others
        assert table.waits_since is not None
        request.swap_s += self._now - table.waits_since
        table.waits_since = None
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

    def _make_room(
        self, request: Request, prefix: Collection[Block], num_new: int, scanned: Collection[int]
    ) -> Claim:
        """Have others give way until a claim can be met; what it lacks stands if it cannot.

        While what it lacks is on its way, it may take what no request runs on and is free at once.
        """
        has_taken = False
        while True:
            has_seat = request.table is not None or self._has_seat
            num_blocks = self._num_taken(prefix, num_new)
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
                self._give_way(victim, num_blocks - self.num_left - num_awaited)
        if has_seat:
            self._num_standing += num_blocks
        return Claim.STANDS

    @staticmethod
    def _num_taken(prefix: Collection[Block], num_new: int) -> int:
        """Return how many fewer Blocks can be had once a table begins with these and new ones."""
        # What no table names counts as available until it is retained.
        return num_new + sum(
            block.state is State.HOST or not (block.refs or block.is_moving) for block in prefix
        )

    def _find_victim(
        self, request: Request, scanned: Collection[int], *, has_seat: bool, is_coming: bool
    ) -> tuple[Request, Way] | None:
        """Return the request that is to give way, and how; None: no one, or not now.

        Where all that is lacking `is_coming`, only what no request runs on and is free at once is
        taken instead.
        """
        if is_coming and not self.pool.num_unwanted:
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
        victim = self._victims.find(request, scanned, self.holders())
        if victim is None and self._reconsider():
            victim = self._victims.find(request, scanned, self.holders())
        return victim

    def _reconsider(self) -> bool:
        """Let tables give way again that had nothing left but what others have let go of since.

        Return whether there may be such a table.
        """
        if not self._has_let_go:
            return False
        self._has_let_go = False
        for table in self._away:
            table.is_drained = False
        self._victims.reconsider()
        return True

    @property
    def _has_seat(self) -> bool:
        return self._max_tables is None or self.num_tables < self._max_tables

    def _way_out(self, table: BlockTable) -> Way:
        return Way.NO_HOST_PLACE if self._swapper is None else self._swapper.way_out(table)

    def _drop(self, victim: Request) -> None:
        self._eviction.dropped(victim)
        self.release(victim)
        victim.restart()

    def _give_way(self, victim: Request, num_blocks: int) -> None:
        """Have a request give up places on the device, as soon as no step touches them."""
        table = victim.table
        assert table is not None
        assert self._swapper is not None
        table.is_resident = False
        table.waits_since = None
        self._away[table] = victim
        if table.steps_in_flight:
            table.is_draining = True
            num_places = sum(b.wanted == 1 and b.state in ON_DEVICE for b in table.blocks)
            self._draining[table] = num_places
            self._num_leaving += num_places
            return
        self._set_wanted(table, is_wanted=False)
        self._swapper.make_room(table, victim.num_computed_tokens, num_blocks)

    def _want(self, table: BlockTable) -> None:
        """Let no more of a table go."""
        if table.waits_since is None:
            table.waits_since = self._now
        table.is_drained = False
        if table.is_draining:
            self._stop_draining(table)
        self._set_wanted(table, is_wanted=True)

    def _set_wanted(self, table: BlockTable, *, is_wanted: bool) -> None:
        """Count a table among those for which each Block is to stay, or no more."""
        if table.is_wanted is not is_wanted:
            table.is_wanted = is_wanted
            change = self.pool.want if is_wanted else self.pool.unwant
            for block in table.blocks:
                change(block)

    def _stop_draining(self, table: BlockTable) -> None:
        table.is_draining = False
        self._num_leaving -= self._draining.pop(table)

    def _grow(self, table: BlockTable, num_blocks: int) -> None:
        for _ in range(num_blocks):
            table.blocks.append(self.pool.take())
        if self._swapper is not None:
            self._swapper.took(num_blocks)

    def _find_prefix(self, request: Request) -> list[Block]:
        """Find the longest cached beginning of a request that is worth having.

        At least one known token is left to compute: its logits are needed. A request that wants
        its prompt scored has to compute all of it.
        """
        if not self._enable_prefix_caching or request.params.prompt_logprobs is not None:
            return []
        blocks: list[Block] = []
        first_absent = num_absent = 0
        for index in range((request.num_tokens - 1) // self.block_size):
            block = self.pool.find(request.block_hash(index, self.block_size))
            if block is None:
                break
            if block.state is State.HOST:
                first_absent = first_absent if num_absent else index
                num_absent += 1
            blocks.append(block)
        if num_absent and not self._is_worth_loading(num_absent):
            del blocks[first_absent:]
        return blocks

    # ── copies ───────────────────────────────────────────────────────────────────────────────

    def copies(self, now: float) -> tuple[Copy, ...]:
        """Return the copies to begin: those of claims, then those ahead of need."""
        swapper = self._swapper
        if swapper is None:
            return ()
        if self._tables:
            swapper.save_ahead(self.holders(), now)
            swapper.fetch_ahead(self._away, self.num_left, now)
        return swapper.take()

    def copied(self, copy_id: int, *, has_failed: bool = False) -> None:
        """Note that a copy was reported. Raises ValueError where none of that id is under way."""
        if self._swapper is None:
            raise ValueError(f"copy {copy_id} is done, and no plan began it")
        blocks = self._swapper.landed(copy_id, has_failed=has_failed)
        if has_failed:
            self._has_let_go = True  # what did not leave can be taken again
            failed = set(blocks)
            for table, request in list(self._away.items()):
                if table.is_lost:
                    self.release(request)
                    request.restart()
                elif not failed.isdisjoint(table.blocks):
                    table.is_stuck = True

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

    def distrust(self, request: Request) -> None:
        """Let nothing of a request be found as a prefix any more: its KV may be no numbers.

        What it found itself goes too, for that may be where they came from.
        """
        for block_hash in request.block_hashes:
            self.pool.unpublish(block_hash)

    def worked(self, device_s: float) -> None:
        """Note the device seconds of a step that is done."""
        self._eviction.worked(device_s)
        if self._swapper is not None:
            self._swapper.worked()

    def release(self, request: Request) -> None:
        """Take its KV from a request, if it holds any; nothing reads it but steps in flight."""
        table, request.table = request.table, None
        if table is None:
            return
        if table.is_draining:
            self._stop_draining(table)
        self._away.pop(table, None)
        table.is_closed = True
        if table.steps_in_flight:
            self._num_leaving += len(table.blocks)
            self._num_closed += 1
        else:
            self._give_back(table)

    def landed(self, table: BlockTable) -> None:
        """Let the Blocks of a table go that is closed or draining if the step was its last."""
        if table.steps_in_flight:
            return
        if table.is_closed:
            self._num_leaving -= len(table.blocks)
            self._num_closed -= 1
            self._give_back(table)
        else:
            self._stop_draining(table)
            self._set_wanted(table, is_wanted=False)

    def _give_back(self, table: BlockTable) -> None:
        del self._tables[table]
        self._set_wanted(table, is_wanted=False)
        # The tail goes first: the head of a prefix is the part that others can share.
        for block in reversed(table.blocks):
            self.pool.release(block)
            if block.refs and not block.wanted:
                self._has_let_go = True

    # ── for tests ────────────────────────────────────────────────────────────────────────────

    def check(self, live: Iterable[Request]) -> None:
        """Assert that the tables are exactly those of live requests and those still in flight."""
        named = {block for table in self._tables for block in table.blocks}
        copied = () if self._swapper is None else tuple(self._swapper.link.blocks())
        assert len(set(copied)) == len(copied), "a block is under two copies"
        self.pool.check(named, copied)
        held = {request.table: request for request in live if request.table is not None}
        closed = [table for table in self._tables if table.is_closed]
        kept = {table: request for table, request in self._tables.items() if not table.is_closed}
        assert kept == held, "a table has no owner, or a request a table that is not kept"
        assert all(table.steps_in_flight > 0 for table in closed), "a closed table was not released"
        assert self._num_closed == len(closed)
        draining = {table for table in kept if table.is_draining}
        assert draining == set(self._draining)
        assert all(table.steps_in_flight > 0 for table in draining)
        num_closing = sum(len(table.blocks) for table in closed)
        assert self._num_leaving == num_closing + sum(self._draining.values())
        assert self._max_tables is None or len(held) <= self._max_tables
        assert set(self._away) == {table for table in kept if not table.is_resident}
        self._check_tables()

    def _check_tables(self) -> None:
        refs: dict[Block, int] = {}
        wanted: dict[Block, int] = {}
        for table, request in self._tables.items():
            assert len(set(table.blocks)) == len(table.blocks)
            assert table.is_closed or table.num_published <= len(table.blocks)
            assert table.is_closed or request.num_computed_tokens <= (
                len(table.blocks) * self.block_size
            )
            assert table.is_wanted or not table.steps_in_flight, "what a step touches may go"
            assert table.is_wanted or not table.is_resident
            if table.is_resident or table.steps_in_flight:
                assert table.is_on_device, "a step touches what is not there"
            for block in table.blocks:
                refs[block] = refs.get(block, 0) + 1
                wanted[block] = wanted.get(block, 0) + table.is_wanted
        assert all(block.refs == count for block, count in refs.items())
        assert all(block.wanted == count for block, count in wanted.items())
