"""Tables: which requests hold KV, and when the Blocks of one that gives way or ends may go.

                            steps in flight                 the last of them
    open ──► resident ── give_way ──► draining ── landed ──► unwanted ── want ──► awaited
                 ▲          └─────────────── none ──────────────▲                    │
                 └───────────────────────────── settle ──────────────────────────────┘

    and close from each of them: at once, or, while steps in flight touch it, with the last of them

Rules: the only writer of a request's `table`; epochs begin and end here. A closed table keeps its
Blocks while steps that touch it are in flight, and so does one that gives way, so no place is
reused under a running kernel. Must not know: claims, who gives way to whom, copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from fastserve.core.memory.block import ON_DEVICE, Block
from fastserve.core.memory.pool import BlockPool
from fastserve.core.memory.table import BlockTable
from fastserve.core.request import Request


class Tables:
    """Tables over one pool; at most `max_tables` requests hold KV at a time."""

    def __init__(self, pool: BlockPool, block_size: int, max_tables: int | None = None) -> None:
        self._pool = pool
        self._block_size = block_size
        self._max_tables = max_tables
        self._owners: dict[BlockTable, Request] = {}
        self._num_opened = 0
        self._residents: dict[int, Request] = {}  # by the number of the table
        self._away: dict[BlockTable, Request] = {}
        self._draining: dict[BlockTable, int] = {}  # → places that become free
        self._num_leaving = 0  # of closed and draining tables
        self._num_closed = 0
        self._has_let_go = False  # of a Block that others name and none wants

    @property
    def num_open(self) -> int:
        """Requests that hold KV."""
        return len(self._owners) - self._num_closed

    @property
    def has_seat(self) -> bool:
        """Whether one more request may hold KV."""
        return self._max_tables is None or self.num_open < self._max_tables

    @property
    def num_leaving(self) -> int:
        """Blocks that wait for steps in flight.

        One that another table shares counts too, though its place does not come free.
        """
        return self._num_leaving

    @property
    def away(self) -> Mapping[BlockTable, Request]:
        """Those that are not resident, and whose they are."""
        return self._away

    @property
    def is_empty(self) -> bool:
        """Whether there is no table, not even a closed one."""
        return not self._owners

    def holders(self) -> Iterator[Request]:
        """Yield the requests that hold KV."""
        return (request for table, request in self._owners.items() if not table.is_closed)

    def residents(self) -> Iterator[Request]:
        """Yield those whose KV is all on the device, in the order of `holders`.

        One whose KV is taken meanwhile, before its turn, is left out. Takes time by their number:
        where KV is short, most holders are away.
        """
        for number in sorted(self._residents):
            request = self._residents.get(number)
            if request is not None:
                yield request

    # ── the life of a table ──────────────────────────────────────────────────────────────────

    def open(self, request: Request, prefix: list[Block]) -> BlockTable:
        """Return the table of a request that begins with these Blocks, all of them full."""
        for block in prefix:
            self._pool.retain(block)
            self._pool.want(block)
        table = BlockTable(prefix, self._num_opened)
        self._num_opened += 1
        self._owners[table] = self._residents[table.number] = request
        request.begin(table, len(prefix) * self._block_size)
        return table

    def begin_away(self, request: Request, table: BlockTable, now: float) -> None:
        """Note that a new table is not all on the device, though a step was to have it."""
        self._leave_device(request, table, waits_since=now)

    def give_way(self, request: Request, table: BlockTable) -> bool:
        """Have a request give up places; return whether its Blocks may go at once."""
        self._leave_device(request, table, waits_since=None)
        if table.steps_in_flight:
            table.is_draining = True
            num_places = sum(b.wanted == 1 and b.state in ON_DEVICE for b in table.blocks)
            self._draining[table] = num_places
            self._num_leaving += num_places
            return False
        self._set_wanted(table, is_wanted=False)
        return True

    def want(self, table: BlockTable, now: float) -> None:
        """Let no more of a table go: a step is to have it."""
        if table.waits_since is None:
            table.waits_since = now
        table.is_drained = False
        if table.is_draining:
            self._stop_draining(table)
        self._set_wanted(table, is_wanted=True)

    def settle(self, table: BlockTable) -> None:
        """Note that a table is all on the device again, for a step to have."""
        self._residents[table.number] = self._away.pop(table)
        table.is_resident = True
        table.num_sent = 0  # its places are others
        table.waits_since = None

    def close(self, request: Request) -> None:
        """Take its KV from a request, if it holds any; nothing reads it but steps in flight."""
        table, request.table = request.table, None
        if table is None:
            return
        if table.is_draining:
            self._stop_draining(table)
        self._away.pop(table, None)
        self._residents.pop(table.number, None)
        table.is_closed = True
        if table.steps_in_flight:
            self._num_leaving += len(table.blocks)
            self._num_closed += 1
        else:
            self._give_back(table)

    def restart(self, request: Request) -> None:
        """End the epoch of a request: it is computed again."""
        self.close(request)
        request.restart()

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

    def _leave_device(
        self, request: Request, table: BlockTable, *, waits_since: float | None
    ) -> None:
        table.is_resident = False
        table.waits_since = waits_since
        self._residents.pop(table.number, None)
        self._away[table] = request

    def _give_back(self, table: BlockTable) -> None:
        del self._owners[table]
        self._set_wanted(table, is_wanted=False)
        # The tail goes first: the head of a prefix is the part that others can share.
        for block in reversed(table.blocks):
            self._pool.release(block)
            if block.refs and not block.wanted:
                self._has_let_go = True

    def _set_wanted(self, table: BlockTable, *, is_wanted: bool) -> None:
        """Count a table among those for which each Block is to stay, or no more."""
        if table.is_wanted is not is_wanted:
            table.is_wanted = is_wanted
            change = self._pool.want if is_wanted else self._pool.unwant
            for block in table.blocks:
                change(block)

    def _stop_draining(self, table: BlockTable) -> None:
        table.is_draining = False
        self._num_leaving -= self._draining.pop(table)

    # ── what can be taken again ──────────────────────────────────────────────────────────────

    def reconsider(self) -> bool:
        """Let tables give way again that had nothing left but what others have let go of since.

        Return whether there may be such a table.
        """
        if not self._has_let_go:
            return False
        self._has_let_go = False
        for table in self._away:
            table.is_drained = False
        return True

    def copy_failed(self, blocks: Iterable[Block]) -> None:
        """Note that Blocks are not where a copy was to bring them.

        What did not leave can be taken again; a request that lost one is computed again.
        """
        self._has_let_go = True
        failed = set(blocks)
        for table, request in list(self._away.items()):
            if table.is_lost:
                self.restart(request)
            elif not failed.isdisjoint(table.blocks):
                table.is_stuck = True

    # ── for tests ────────────────────────────────────────────────────────────────────────────

    def blocks(self) -> set[Block]:
        """Return what tables name, closed ones included."""
        return {block for table in self._owners for block in table.blocks}

    def check(self, live: Iterable[Request]) -> None:
        """Assert that the tables are exactly those of live requests and those still in flight."""
        held = {request.table: request for request in live if request.table is not None}
        closed = [table for table in self._owners if table.is_closed]
        kept = {table: request for table, request in self._owners.items() if not table.is_closed}
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
        assert list(self.residents()) == [kept[table] for table in kept if table.is_resident]
        self._check_blocks()

    def _check_blocks(self) -> None:
        refs: dict[Block, int] = {}
        wanted: dict[Block, int] = {}
        for table, request in self._owners.items():
            assert len(set(table.blocks)) == len(table.blocks)
            assert table.is_closed or table.num_published <= len(table.blocks)
            assert table.is_closed or request.num_computed_tokens <= (
                len(table.blocks) * self._block_size
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
