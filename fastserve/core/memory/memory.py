"""KVCacheManager: which Blocks hold the KV of which request.

Rules: the only owner of block tables. A table that is closed while steps that touch it are in
flight gives its Blocks back when the last of them has landed, so no place is reused under a
running kernel. Only full Blocks are shared; a partial tail is recomputed, so nothing is ever
copied on write. Must not know: the order of requests, tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastserve.core.memory.block import Block, BlockPool
from fastserve.core.memory.table import BlockTable
from fastserve.core.request import Request


class KVCacheManager:
    """Tables over one pool."""

    def __init__(
        self, pool: BlockPool, block_size: int, *, enable_prefix_caching: bool, salt: bytes = b""
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self._enable_prefix_caching = enable_prefix_caching
        self._salt = salt
        self._tables: dict[BlockTable, Request] = {}
        self._num_leaving = 0
        self._num_closed = 0

    @property
    def num_available(self) -> int:
        """Blocks that can be taken now."""
        return self.pool.num_available

    @property
    def num_leaving(self) -> int:
        """Blocks of closed tables that wait for steps in flight; shared ones count too."""
        return self._num_leaving

    @property
    def num_tables(self) -> int:
        """Requests that hold KV."""
        return len(self._tables) - self._num_closed

    def holders(self) -> Iterator[Request]:
        """Yield the requests that hold KV."""
        return (request for table, request in self._tables.items() if not table.is_closed)

    def num_blocks(self, num_tokens: int) -> int:
        """Return the blocks that hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, request: Request) -> list[Block]:
        """Find the longest cached beginning of a request.

        At least one known token is left to compute: its logits are needed. A request that wants
        its prompt scored has to compute all of it.
        """
        if not self._enable_prefix_caching or request.params.prompt_logprobs is not None:
            return []
        blocks: list[Block] = []
        for index in range((request.num_tokens - 1) // self.block_size):
            block = self.pool.find(request.block_hash(index, self.block_size, self._salt))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def open(self, request: Request) -> BlockTable:
        """Start the table of a request with the Blocks that already hold its beginning."""
        blocks = self.match_prefix(request)
        for block in blocks:
            self.pool.retain(block)
        table = BlockTable(blocks)
        self._tables[table] = request
        request.table = table
        request.num_computed_tokens = len(blocks) * self.block_size
        request.num_scheduled_tokens = request.num_computed_tokens
        return table

    def grow(self, table: BlockTable, num_blocks: int) -> None:
        """Append empty Blocks to a table. The caller has seen that they are available."""
        for _ in range(num_blocks):
            table.blocks.append(self.pool.take())

    def close(self, table: BlockTable) -> None:
        """Give the Blocks of a table back, once no step in flight touches them."""
        table.is_closed = True
        if table.steps_in_flight:
            self._num_leaving += len(table.blocks)
            self._num_closed += 1
        else:
            self._release(table)

    def land(self, table: BlockTable) -> None:
        """Release a closed table once the last step that touched it is done."""
        if not table.steps_in_flight:
            self._num_leaving -= len(table.blocks)
            self._num_closed -= 1
            self._release(table)

    def publish(self, request: Request, table: BlockTable) -> None:
        """Make the Blocks that a request has filled findable as prefix."""
        num_full = request.num_computed_tokens // self.block_size
        if self._enable_prefix_caching and table.num_published < num_full:
            request.block_hash(num_full - 1, self.block_size, self._salt)  # and all before it
            for index in range(table.num_published, num_full):
                self.pool.publish(table.blocks[index], request.block_hashes[index])
        table.num_published = max(table.num_published, num_full)

    def _release(self, table: BlockTable) -> None:
        del self._tables[table]
        # The tail goes first: the head of a prefix is the part that others can share.
        for block in reversed(table.blocks):
            self.pool.release(block)

    def check(self, live: Iterable[BlockTable]) -> None:
        """Assert that the tables are exactly the live ones and those still in flight."""
        self.pool.check()
        live = list(live)
        assert all(table in self._tables and not table.is_closed for table in live)
        closed = [table for table in self._tables if table.is_closed]
        assert all(table.steps_in_flight > 0 for table in closed), "a closed table was not released"
        assert len(live) + len(closed) == len(self._tables), "a table has no owner"
        refs: dict[Block, int] = {}
        for table, request in self._tables.items():
            assert table.is_closed or request.table is table
            assert len(set(table.blocks)) == len(table.blocks)
            for block in table.blocks:
                refs[block] = refs.get(block, 0) + 1
        assert all(block.refs == count for block, count in refs.items())
        assert len(refs) == self.pool.num_used
