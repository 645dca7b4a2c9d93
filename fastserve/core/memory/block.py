"""Blocks of KV and the pool that owns their places.

A Block is content, not place: it is append-only, immutable once full, and outlives the request
that computed it as long as its place is not needed. Rules: a place belongs to exactly one Block or
to the free list; a Block that no table names and that has a hash stays as prefix cache, least
recently used first to go. Must not know: requests, policies, tensors.
"""

from __future__ import annotations

from collections import OrderedDict


class Block:
    """`block_size` token positions of KV in every layer.

    `refs` counts the tables that name it. `hash` identifies the ids of this block and of all before
    it; None until the block is full and its ids are known.
    """

    __slots__ = ("device_id", "hash", "refs")

    def __init__(self, device_id: int) -> None:
        self.device_id = device_id
        self.refs = 0
        self.hash: bytes | None = None

    def __repr__(self) -> str:
        return f"Block(device_id={self.device_id}, refs={self.refs}, hash={self.hash!r})"


class BlockPool:
    """The device places, and which Block sits in each.

    free + cached + used = total, always.
    """

    def __init__(self, num_device_blocks: int) -> None:
        self.num_device_blocks = num_device_blocks
        self._free: list[int] = []
        self._num_touched = 0  # places from here on have never been used
        # Unreferenced, least recently used first; a plain dict is slow to give up its first key.
        self._cached: OrderedDict[Block, None] = OrderedDict()
        self._by_hash: dict[bytes, Block] = {}
        self._used: dict[int, Block] = {}

    @property
    def num_free(self) -> int:
        """Places that hold nothing."""
        return self.num_device_blocks - self._num_touched + len(self._free)

    @property
    def num_cached(self) -> int:
        """Places that hold a Block which no table names."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Places that `take` can still hand out."""
        return self.num_free + len(self._cached)

    @property
    def num_used(self) -> int:
        """Places that hold a Block which some table names."""
        return len(self._used)

    def find(self, block_hash: bytes) -> Block | None:
        """Return the Block with this content, if its KV is still there."""
        return self._by_hash.get(block_hash)

    def take(self) -> Block:
        """Return a new, empty Block, named once. The caller has seen that one is available."""
        if self._free:
            block = Block(self._free.pop())
        elif self._num_touched < self.num_device_blocks:
            block = Block(self._num_touched)
            self._num_touched += 1
        else:
            evicted, _ = self._cached.popitem(last=False)
            assert evicted.hash is not None
            del self._by_hash[evicted.hash]
            block = Block(evicted.device_id)
        block.refs = 1
        self._used[block.device_id] = block
        return block

    def retain(self, block: Block) -> None:
        """Name a Block once more."""
        if block.refs == 0:
            del self._cached[block]
            self._used[block.device_id] = block
        block.refs += 1

    def release(self, block: Block) -> None:
        """Name a Block once less; its place becomes available with the last name."""
        block.refs -= 1
        if block.refs:
            return
        del self._used[block.device_id]
        if block.hash is None:
            self._free.append(block.device_id)
        else:
            self._cached[block] = None

    def publish(self, block: Block, block_hash: bytes) -> None:
        """Make a full Block findable, unless a twin with the same content already is."""
        if block.hash is None and block_hash not in self._by_hash:
            block.hash = block_hash
            self._by_hash[block_hash] = block

    def check(self) -> None:
        """Assert that every place has exactly one owner."""
        assert self._num_touched <= self.num_device_blocks
        places = sorted([*self._free, *self._used, *(block.device_id for block in self._cached)])
        assert places == list(range(self._num_touched)), f"places are not a partition: {places}"
        assert all(block.refs > 0 for block in self._used.values())
        assert all(self._used[device_id].device_id == device_id for device_id in self._used)
        assert all(block.refs == 0 and block.hash is not None for block in self._cached)
        for block_hash, block in self._by_hash.items():
            assert block.hash == block_hash
            assert block in self._cached or self._used.get(block.device_id) is block
