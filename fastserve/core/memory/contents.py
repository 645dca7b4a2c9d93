"""Contents: which Block has a given content, found by the hash of its ids and of all before them.

Rules: of Blocks with equal content one can be found, the one that was published first. Must not
know: who asks, where a Block is, what is given up.
"""

from __future__ import annotations

from collections.abc import Collection

from fastserve.core.memory.block import Block


class Contents:
    """Blocks by their hash; a Block that has one can be found."""

    def __init__(self) -> None:
        self._by_hash: dict[bytes, Block] = {}

    def find(self, block_hash: bytes) -> Block | None:
        """Return the Block with this content, if there is one."""
        return self._by_hash.get(block_hash)

    def publish(self, block: Block, block_hash: bytes) -> None:
        """Make a full Block findable, unless a twin with the same content already is."""
        if block.hash is None and block_hash not in self._by_hash:
            block.hash = block_hash
            self._by_hash[block_hash] = block

    def forget(self, block: Block) -> None:
        """Let nobody find a Block any more."""
        if block.hash is not None:
            del self._by_hash[block.hash]
            block.hash = None

    def check(self, blocks: Collection[Block]) -> None:
        """Assert that what can be found is one of these, and knows by what."""
        for block_hash, block in self._by_hash.items():
            assert block.hash == block_hash
            assert block in blocks
