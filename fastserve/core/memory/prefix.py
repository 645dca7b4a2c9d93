"""PrefixCache: the Blocks that already hold the beginning of a request, by their content.

Rules: only full Blocks are shared; a partial tail is recomputed, so nothing is ever copied on
write. What may be no numbers is found by nobody. Must not know: which places there are, what is
given up first, claims.
"""

from __future__ import annotations

from collections.abc import Callable

from fastserve.core.memory.block import Block, State
from fastserve.core.memory.pool import BlockPool
from fastserve.core.memory.table import BlockTable
from fastserve.core.request import Request


class PrefixCache:
    """Finds nothing unless it `is_enabled`.

    `is_worth_loading` says whether so many cached Blocks that only the host has are sooner loaded
    than computed.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        is_worth_loading: Callable[[int], bool],
        *,
        is_enabled: bool,
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._is_worth_loading = is_worth_loading
        self._is_enabled = is_enabled

    def find(self, request: Request) -> list[Block]:
        """Find the longest cached beginning of a request that is worth having.

        At least one known token is left to compute: its logits are needed. A request that wants
        its prompt scored has to compute all of it.
        """
        if not self._is_enabled or request.params.prompt_logprobs is not None:
            return []
        blocks: list[Block] = []
        first_absent = num_absent = 0
        for index in range((request.num_tokens - 1) // self._block_size):
            block = self._pool.find(request.block_hash(index, self._block_size))
            if block is None:
                break
            if block.state is State.HOST:
                first_absent = first_absent if num_absent else index
                num_absent += 1
            blocks.append(block)
        if num_absent and not self._is_worth_loading(num_absent):
            del blocks[first_absent:]
        return blocks

    def publish(self, request: Request, table: BlockTable, num_full: int) -> None:
        """Make the first Blocks of a table findable, which are full."""
        if self._is_enabled:
            request.block_hash(num_full - 1, self._block_size)  # and all before it
            for index in range(table.num_published, num_full):
                self._pool.publish(table.blocks[index], request.block_hashes[index])
        table.num_published = num_full

    def distrust(self, request: Request) -> None:
        """Let nothing of a request be found any more: its KV may be no numbers.

        What it found itself goes too, for that may be where they came from.
        """
        for block_hash in request.block_hashes:
            self._pool.unpublish(block_hash)
