"""BlockPool: the places of both tiers, which Block has them, and which content can be found.

Rules: a place belongs to exactly one Block or is free. A Block that no table names and that has a
hash stays as prefix cache on whichever tiers it is; on each tier the least recently used goes
first. A host place is taken from what is free, then from the prefix cache, then from what is on the
device as well and in use. Must not know: requests, policies, tensors, when a copy is done.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator

from fastserve.core.memory.block import NO_PLACE, Block, Event, State
from fastserve.core.memory.places import Places


class BlockPool:
    """On each tier free + cached + moving + used = total, always.

    With `saves_evicted` what leaves the prefix cache on the device is on the host at once.
    """

    def __init__(
        self, num_device_blocks: int, num_host_blocks: int = 0, *, saves_evicted: bool = False
    ) -> None:
        self._device = Places(num_device_blocks)
        self._host = Places(num_host_blocks)
        self._saves_evicted = saves_evicted
        self._by_hash: dict[bytes, Block] = {}
        # Not named by any table, least recently used first; a plain dict is slow to give up its
        # first key. A Block on both tiers is in both of the first two.
        self._cached: OrderedDict[Block, None] = OrderedDict()  # on the device
        self._saved: OrderedDict[Block, None] = OrderedDict()  # on the host
        self._unsaved: OrderedDict[Block, None] = OrderedDict()  # on the device alone
        # Named by a table and CLEAN, the coldest when it was saved first.
        self._twins: OrderedDict[Block, None] = OrderedDict()
        self._num_saving = 0
        self._num_loading = 0
        self.num_leaving = 0  # places on the device that become free when a copy is done
        self._num_held_by_copies = 0  # SAVING, and named by no table
        self.num_unwanted = 0  # places on the device that hold what tables name, and none wants

    # ── how much there is ────────────────────────────────────────────────────────────────────

    @property
    def num_device_blocks(self) -> int:
        """Places on the device."""
        return self._device.total

    @property
    def num_host_blocks(self) -> int:
        """Places on the host."""
        return self._host.total

    @property
    def num_free(self) -> int:
        """Places on the device that hold nothing."""
        return self._device.num_free

    @property
    def num_cached(self) -> int:
        """Places on the device that hold a Block which no table names, and no copy reads."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Places on the device that can be had at once."""
        return self._device.num_free + len(self._cached)

    @property
    def num_moving(self) -> int:
        """Places on the device that a copy writes, or holds beyond the need of any table."""
        return self._num_loading + self.num_leaving + self._num_held_by_copies

    @property
    def num_used(self) -> int:
        """Places on the device that hold a Block which some table names."""
        return self._device.total - self.num_available - self.num_moving

    @property
    def num_host_free(self) -> int:
        """Places on the host that hold nothing."""
        return self._host.num_free

    @property
    def num_host_cached(self) -> int:
        """Places on the host that hold a Block which no table names."""
        return len(self._saved)

    @property
    def num_host_moving(self) -> int:
        """Places on the host that a copy writes."""
        return self._num_saving + self.num_leaving

    @property
    def num_host_used(self) -> int:
        """Places on the host that hold a Block which some table names."""
        cached = self.num_host_free + self.num_host_cached
        return self._host.total - cached - self.num_host_moving

    @property
    def num_away(self) -> int:
        """Blocks which some table names that are not on the device, or on their way there."""
        return self.num_host_used - len(self._twins)

    @property
    def num_on_both(self) -> int:
        """Blocks which some table names that can be read on either tier."""
        return len(self._twins)

    @property
    def num_host_available(self) -> int:
        """Places on the host that can be had at once."""
        return self._host.num_free + len(self._saved) + len(self._twins)

    @property
    def has_spare_host_place(self) -> bool:
        """Whether a host place can be had that holds nothing, or what only the host remembers.

        A copy ahead of need takes no other: it would make what it displaces unsaved again.
        """
        if self._host.num_free:
            return True
        oldest = next(iter(self._saved), None)
        return oldest is not None and oldest.state is State.HOST

    # ── content ──────────────────────────────────────────────────────────────────────────────

    def find(self, block_hash: bytes) -> Block | None:
        """Return the Block with this content, if its KV is still there on either tier."""
        return self._by_hash.get(block_hash)

    def publish(self, block: Block, block_hash: bytes) -> None:
        """Make a full Block findable, unless a twin with the same content already is."""
        if block.hash is None and block_hash not in self._by_hash:
            block.hash = block_hash
            self._by_hash[block_hash] = block

    def unpublish(self, block_hash: bytes) -> None:
        """Let nobody find this content any more; its places are free where no table names it."""
        block = self._by_hash.get(block_hash)
        if block is None:
            return
        self._unpublish(block)
        if not (block.refs or block.is_moving):
            for drawer in (self._cached, self._unsaved, self._saved):
                drawer.pop(block, None)
            self._file(block)

    def unsaved(self) -> Iterator[Block]:
        """Yield what only the prefix cache of the device has, the next to be displaced first."""
        return iter(self._unsaved)

    # ── names ────────────────────────────────────────────────────────────────────────────────

    def take(self) -> Block:
        """Return a new, empty Block, named once. The caller has seen that one is available."""
        block = Block(self._take_device_place())
        block.refs = block.wanted = 1
        return block

    def want(self, block: Block) -> None:
        """Have a named Block stay for one table more."""
        if not block.wanted and block.is_on_device:
            self.num_unwanted -= 1
        block.wanted += 1

    def unwant(self, block: Block) -> None:
        """Have it stay for one table less."""
        block.wanted -= 1
        if not block.wanted and block.is_on_device:
            self.num_unwanted += 1

    def retain(self, block: Block) -> None:
        """Name a Block once more."""
        if block.refs == 0:
            self._cached.pop(block, None)
            self._unsaved.pop(block, None)
            self._saved.pop(block, None)
            if block.state is State.CLEAN:
                self._twins[block] = None
            elif block.state is State.SAVING:
                self._num_held_by_copies -= 1
            if block.is_on_device:
                self.num_unwanted += 1
        block.refs += 1

    def release(self, block: Block) -> None:
        """Name a Block once less; its places become available with the last name."""
        block.refs -= 1
        if block.refs:
            return
        if block.is_on_device:
            self.num_unwanted -= 1
        if block.state is State.CLEAN:
            self._twins.pop(block, None)
        elif block.state is State.SAVING:
            self._num_held_by_copies += 1
        self._file(block)

    # ── copies ───────────────────────────────────────────────────────────────────────────────

    def save(self, block: Block) -> None:
        """Give a DIRTY Block a place on the host, which a copy is about to fill."""
        if block.refs == 0:
            del self._cached[block]
            del self._unsaved[block]
            self._num_held_by_copies += 1
        block.host_id = self._take_host_place()
        block.meet(Event.SAVE)
        self._num_saving += 1

    def leave(self, block: Block) -> bool:
        """Let the place on the device of a named Block become free once it is on the host.

        Return whether a copy has to begin for that; it is under way already where it was SAVING.
        """
        is_new = block.state is State.DIRTY
        if is_new:
            block.host_id = self._take_host_place()
        else:
            self._num_saving -= 1
        if not block.wanted:
            self.num_unwanted -= 1
        block.meet(Event.LEAVE)
        self.num_leaving += 1
        return is_new

    def stay(self, block: Block) -> None:
        """Let a LEAVING Block keep its place on the device."""
        block.meet(Event.STAY)
        if not block.wanted:
            self.num_unwanted += 1
        self.num_leaving -= 1
        self._num_saving += 1

    def saved(self, block: Block) -> None:
        """Note that a Block has arrived on the host."""
        is_leaving = self._end_saving(block)
        block.meet(Event.SAVED)
        if is_leaving:
            self._leave_device(block)
        self._file(block, is_old=True)

    def save_failed(self, block: Block) -> None:
        """Note that nothing of a Block has arrived on the host."""
        if self._end_saving(block) and block.refs and not block.wanted:
            self.num_unwanted += 1
        block.meet(Event.SAVE_FAILED)
        self._leave_host(block)
        self._file(block, is_old=True)

    def _end_saving(self, block: Block) -> bool:
        is_leaving = block.state is State.LEAVING
        if is_leaving:
            self.num_leaving -= 1
        else:
            self._num_saving -= 1
            if block.refs == 0:
                self._num_held_by_copies -= 1
        return is_leaving

    def drop(self, block: Block) -> None:
        """Give up the place on the device of a CLEAN Block that a table names."""
        del self._twins[block]
        if not block.wanted:
            self.num_unwanted -= 1
        block.meet(Event.DROP)
        self._leave_device(block)

    def load(self, block: Block) -> None:
        """Give a named HOST Block a place on the device, which a copy is about to fill."""
        block.device_id = self._take_device_place()
        block.meet(Event.LOAD)
        self._num_loading += 1

    def loaded(self, block: Block) -> None:
        """Note that a Block has arrived on the device."""
        block.meet(Event.LOADED)
        if block.refs and not block.wanted:
            self.num_unwanted += 1
        self._num_loading -= 1
        self._file(block)

    def load_failed(self, block: Block) -> None:
        """Note that a Block is lost: what is at neither end can be trusted."""
        block.meet(Event.LOAD_FAILED)
        self._num_loading -= 1
        self._unpublish(block)
        self._leave_device(block)
        self._leave_host(block)

    def forget_host(self, block: Block) -> None:
        """Give up the place on the host of a CLEAN Block that a table names: it will change."""
        del self._twins[block]
        block.meet(Event.FORGET_HOST)
        self._leave_host(block)

    # ── places ───────────────────────────────────────────────────────────────────────────────

    def _take_device_place(self) -> int:
        if self._device.num_free:
            return self._device.take()
        evicted, _ = self._cached.popitem(last=False)
        if evicted.state is State.DIRTY:
            del self._unsaved[evicted]
            if self._saves_evicted and self._host.num_free:
                evicted.host_id = self._host.take()
                evicted.meet(Event.SAVE)
                evicted.meet(Event.SAVED)
                self._saved[evicted] = None
        place, evicted.device_id = evicted.device_id, NO_PLACE
        if evicted.state is State.CLEAN:
            evicted.meet(Event.DROP)
        else:
            evicted.meet(Event.FORGET)
            self._unpublish(evicted)
        return place

    def _take_host_place(self) -> int:
        if self._host.num_free:
            return self._host.take()
        if not self._saved:
            warmest, _ = self._twins.popitem()
            warmest.meet(Event.FORGET_HOST)
            place, warmest.host_id = warmest.host_id, NO_PLACE
            return place
        oldest, _ = self._saved.popitem(last=False)
        place, oldest.host_id = oldest.host_id, NO_PLACE
        if oldest.state is State.CLEAN:
            oldest.meet(Event.FORGET_HOST)
            self._unsaved[oldest] = None
        else:
            oldest.meet(Event.FORGET)
            self._unpublish(oldest)
        return place

    def _leave_device(self, block: Block) -> None:
        self._device.give_back(block.device_id)
        block.device_id = NO_PLACE

    def _leave_host(self, block: Block) -> None:
        self._host.give_back(block.host_id)
        block.host_id = NO_PLACE

    def _unpublish(self, block: Block) -> None:
        if block.hash is not None:
            del self._by_hash[block.hash]
            block.hash = None

    def _file(self, block: Block, *, is_old: bool = False) -> None:
        """Put a Block whose names or copies have changed where it is looked for.

        One that was saved ahead of need is as little used as it was before.
        """
        state = block.state
        if block.is_moving or state is State.GONE:
            return
        if block.refs:
            if state is State.CLEAN:
                self._twins[block] = None
            return
        if block.hash is None:
            block.meet(Event.FORGET)
            if block.device_id != NO_PLACE:
                self._leave_device(block)
            if block.host_id != NO_PLACE:
                self._leave_host(block)
            return
        if state is not State.HOST:
            self._put(self._cached, block, is_old=is_old)
        if state is State.DIRTY:
            self._put(self._unsaved, block, is_old=is_old)
        else:
            self._saved[block] = None

    @staticmethod
    def _put(drawer: OrderedDict[Block, None], block: Block, *, is_old: bool) -> None:
        drawer[block] = None
        if is_old:
            drawer.move_to_end(block, last=False)

    # ── for tests ────────────────────────────────────────────────────────────────────────────

    def check(self, named: Collection[Block], copied: Collection[Block]) -> None:
        """Assert that every place has one owner; Blocks are named by tables or under a copy."""
        blocks = {*named, *copied, *self._cached, *self._saved}
        self._device.check([b.device_id for b in blocks if b.device_id != NO_PLACE])
        self._host.check([b.host_id for b in blocks if b.host_id != NO_PLACE])
        moving = {block for block in blocks if block.is_moving}
        assert moving == set(copied), "a copy is not under way, or its block does not know"
        for block in blocks:
            has_device = block.device_id != NO_PLACE
            has_host = block.host_id != NO_PLACE
            assert has_device == (block.state not in (State.HOST, State.GONE)), block
            assert has_host == (block.state not in (State.DIRTY, State.GONE)), block
            assert 0 <= block.wanted <= block.refs, block
            is_kept = block.refs == 0 and not block.is_moving
            assert (block in self._cached) == (is_kept and has_device), block
            assert (block in self._saved) == (is_kept and has_host), block
            assert (block in self._unsaved) == (is_kept and not has_host), block
            assert (block in self._twins) == (block.refs > 0 and block.state is State.CLEAN), block
            assert block.refs or block.is_moving or block.hash is not None, block
        for block_hash, block in self._by_hash.items():
            assert block.hash == block_hash
            assert block in blocks
        count = Counter(block.state for block in blocks)
        assert self._num_saving == count[State.SAVING]
        assert self.num_leaving == count[State.LEAVING]
        assert self._num_loading == count[State.LOADING]
        held = sum(b.state is State.SAVING and not b.refs for b in blocks)
        assert self._num_held_by_copies == held
        spare = sum(b.is_on_device and b.refs > 0 and not b.wanted for b in blocks)
        assert self.num_unwanted == spare
