"""BlockPool: the places of both tiers, which Block has them, and which content can be found.

Rules: a place belongs to exactly one Block or is free. A Block that no table names and that has a
hash stays as prefix cache on whichever tiers it is. The only writer of Blocks and tiers, with the
parts it is made of. Must not know: requests, policies, tensors, when a copy is done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from fastserve.core.memory.block import NO_PLACE, Block, Event, State
from fastserve.core.memory.contents import Contents
from fastserve.core.memory.replacement import Replacement
from fastserve.core.memory.tier import Tier


class BlockPool:
    """The tiers `device` and `host`, for others to read, and the Blocks that are on them.

    With `saves_evicted` what leaves the prefix cache on the device is on the host at once.
    """

    def __init__(
        self, num_device_blocks: int, num_host_blocks: int = 0, *, saves_evicted: bool = False
    ) -> None:
        self.device = Tier(num_device_blocks)
        self.host = Tier(num_host_blocks)
        self._contents = Contents()
        self._replacement = Replacement(
            self.device, self.host, self._contents, saves_evicted=saves_evicted
        )
        self.num_leaving = 0  # places on the device that become free when a copy is done
        self.num_unwanted = 0  # places on the device that hold what tables name, and none wants

    # ── how much there is ────────────────────────────────────────────────────────────────────

    @property
    def num_away(self) -> int:
        """Blocks which some table names that are not on the device, or on their way there."""
        return self.host.num_used - self._replacement.num_twins

    @property
    def num_on_both(self) -> int:
        """Blocks which some table names that can be read on either tier."""
        return self._replacement.num_twins

    @property
    def num_host_available(self) -> int:
        """Places on the host that can be had at once."""
        return self.host.num_available + self._replacement.num_twins

    @property
    def has_spare_host_place(self) -> bool:
        """Whether a host place can be had that holds nothing, or what only the host remembers.

        A copy ahead of need takes no other: it would make what it displaces unsaved again.
        """
        return self._replacement.has_spare_host_place

    # ── content ──────────────────────────────────────────────────────────────────────────────

    def find(self, block_hash: bytes) -> Block | None:
        """Return the Block with this content, if its KV is still there on either tier."""
        return self._contents.find(block_hash)

    def publish(self, block: Block, block_hash: bytes) -> None:
        """Make a full Block findable, unless a twin with the same content already is."""
        self._contents.publish(block, block_hash)

    def unpublish(self, block_hash: bytes) -> None:
        """Let nobody find this content any more; its places are free where no table names it."""
        block = self._contents.find(block_hash)
        if block is None:
            return
        self._contents.forget(block)
        if not (block.refs or block.is_moving):
            self._replacement.need(block)
            self._file(block)

    def unsaved(self) -> Iterator[Block]:
        """Yield what only the prefix cache of the device has, the next to be displaced first."""
        return self._replacement.unsaved()

    # ── names ────────────────────────────────────────────────────────────────────────────────

    def take(self) -> Block:
        """Return a new, empty Block, named once. The caller has seen that one is available."""
        block = Block(self._replacement.take_device_place())
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
            self._replacement.need(block)
            if block.state is State.CLEAN:
                self._replacement.pair(block)
            elif block.state is State.SAVING:
                self.device.num_moving -= 1
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
            self._replacement.unpair(block)
        elif block.state is State.SAVING:
            self.device.num_moving += 1
        self._file(block)

    # ── copies ───────────────────────────────────────────────────────────────────────────────

    def save(self, block: Block) -> None:
        """Give a DIRTY Block a place on the host, which a copy is about to fill."""
        if block.refs == 0:
            self._replacement.need(block)
            self.device.num_moving += 1
        block.host_id = self._replacement.take_host_place()
        block.meet(Event.SAVE)
        self.host.num_moving += 1

    def leave(self, block: Block) -> bool:
        """Let the place on the device of a named Block become free once it is on the host.

        Return whether a copy has to begin for that; it is under way already where it was SAVING.
        """
        is_new = block.state is State.DIRTY
        if is_new:
            block.host_id = self._replacement.take_host_place()
            self.host.num_moving += 1
        if not block.wanted:
            self.num_unwanted -= 1
        block.meet(Event.LEAVE)
        self.num_leaving += 1
        self.device.num_moving += 1
        return is_new

    def stay(self, block: Block) -> None:
        """Let a LEAVING Block keep its place on the device."""
        block.meet(Event.STAY)
        if not block.wanted:
            self.num_unwanted += 1
        self.num_leaving -= 1
        self.device.num_moving -= 1

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
        self.num_leaving -= is_leaving
        self.host.num_moving -= 1
        if is_leaving or block.refs == 0:
            self.device.num_moving -= 1
        return is_leaving

    def drop(self, block: Block) -> None:
        """Give up the place on the device of a CLEAN Block that a table names."""
        self._replacement.unpair(block)
        if not block.wanted:
            self.num_unwanted -= 1
        block.meet(Event.DROP)
        self._leave_device(block)

    def load(self, block: Block) -> None:
        """Give a named HOST Block a place on the device, which a copy is about to fill."""
        block.device_id = self._replacement.take_device_place()
        block.meet(Event.LOAD)
        self.device.num_moving += 1

    def loaded(self, block: Block) -> None:
        """Note that a Block has arrived on the device."""
        block.meet(Event.LOADED)
        if block.refs and not block.wanted:
            self.num_unwanted += 1
        self.device.num_moving -= 1
        self._file(block)

    def load_failed(self, block: Block) -> None:
        """Note that a Block is lost: what is at neither end can be trusted."""
        block.meet(Event.LOAD_FAILED)
        self.device.num_moving -= 1
        self._contents.forget(block)
        self._leave_device(block)
        self._leave_host(block)

    def forget_host(self, block: Block) -> None:
        """Give up the place on the host of a CLEAN Block that a table names: it will change."""
        self._replacement.unpair(block)
        block.meet(Event.FORGET_HOST)
        self._leave_host(block)

    # ── places ───────────────────────────────────────────────────────────────────────────────

    def _leave_device(self, block: Block) -> None:
        self.device.give_back(block.device_id)
        block.device_id = NO_PLACE

    def _leave_host(self, block: Block) -> None:
        self.host.give_back(block.host_id)
        block.host_id = NO_PLACE

    def _file(self, block: Block, *, is_old: bool = False) -> None:
        """Keep a Block whose names or copies have changed for as long as anybody may find it."""
        if block.is_moving or block.state is State.GONE:
            return
        if block.refs:
            if block.state is State.CLEAN:
                self._replacement.pair(block)
        elif block.hash is not None:
            self._replacement.keep(block, is_old=is_old)
        else:
            block.meet(Event.FORGET)
            if block.device_id != NO_PLACE:
                self._leave_device(block)
            if block.host_id != NO_PLACE:
                self._leave_host(block)

    # ── for tests ────────────────────────────────────────────────────────────────────────────

    def check(self, named: Collection[Block], copied: Collection[Block]) -> None:
        """Assert that every place has one owner; Blocks are named by tables or under a copy."""
        blocks = {*named, *copied, *self.device.kept(), *self.host.kept()}
        moving = {block for block in blocks if block.is_moving}
        assert moving == set(copied), "a copy is not under way, or its block does not know"
        for block in blocks:
            has_device = block.device_id != NO_PLACE
            has_host = block.host_id != NO_PLACE
            assert has_device == (block.state not in (State.HOST, State.GONE)), block
            assert has_host == (block.state not in (State.DIRTY, State.GONE)), block
            assert 0 <= block.wanted <= block.refs, block
            assert block.refs or block.is_moving or block.hash is not None, block
        self._contents.check(blocks)
        self._replacement.check(blocks)
        self._check_counts(blocks)

    def _check_counts(self, blocks: Collection[Block]) -> None:
        count = Counter(block.state for block in blocks)
        assert self.num_leaving == count[State.LEAVING]
        spare = sum(b.is_on_device and b.refs > 0 and not b.wanted for b in blocks)
        assert self.num_unwanted == spare
        kept = [block for block in blocks if block.refs == 0 and not block.is_moving]
        held = sum(b.state is State.SAVING and not b.refs for b in blocks)
        self.device.check_account(
            [block.device_id for block in blocks if block.device_id != NO_PLACE],
            [block for block in kept if block.device_id != NO_PLACE],
            count[State.LOADING] + count[State.LEAVING] + held,
        )
        self.host.check_account(
            [block.host_id for block in blocks if block.host_id != NO_PLACE],
            [block for block in kept if block.host_id != NO_PLACE],
            count[State.SAVING] + count[State.LEAVING],
        )
