"""Replacement: which Block gives up its place for another, on either tier, and what becomes of it.

    on the device   what is free │ the prefix cache, the least recently used first
    on the host     what is free │ the prefix cache, likewise │ of what is on the device as well and
                                                                in use, what was saved last

Rules: what no table names and no copy touches is kept while it can be found, on whichever tiers it
is. What is displaced is lost where its other place holds nothing. Must not know: tables, what a
copy moves, who needs a place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator

from fastserve.core.memory.block import NO_PLACE, Block, Event, State
from fastserve.core.memory.contents import Contents
from fastserve.core.memory.tier import Tier


class Replacement:
    """Places of two tiers, of which those in use are given back by others.

    With `saves_evicted` what leaves the prefix cache on the device is on the host at once.
    """

    def __init__(
        self, device: Tier, host: Tier, contents: Contents, *, saves_evicted: bool
    ) -> None:
        self._device = device
        self._host = host
        self._contents = contents
        self._saves_evicted = saves_evicted
        # Kept on the device and not on the host, least recently used first.
        self._unsaved: OrderedDict[Block, None] = OrderedDict()
        # Named by a table and CLEAN, the coldest when it was saved first.
        self._twins: OrderedDict[Block, None] = OrderedDict()

    @property
    def num_twins(self) -> int:
        """Blocks which some table names that can be read on either tier."""
        return len(self._twins)

    @property
    def has_spare_host_place(self) -> bool:
        """Whether a host place can be had that holds nothing, or what only the host remembers."""
        if self._host.num_free:
            return True
        oldest = self._host.oldest
        return oldest is not None and oldest.state is State.HOST

    def unsaved(self) -> Iterator[Block]:
        """Yield what only the prefix cache of the device has, the next to be displaced first."""
        return iter(self._unsaved)

    # ── places for others ────────────────────────────────────────────────────────────────────

    def take_device_place(self) -> int:
        """Return a place on the device; the caller has seen that one is available."""
        if self._device.num_free:
            return self._device.take()
        displaced = self._device.displace()
        if displaced.state is State.DIRTY:
            del self._unsaved[displaced]
            if self._saves_evicted and self._host.num_free:
                displaced.host_id = self._host.take()
                displaced.meet(Event.SAVE)
                displaced.meet(Event.SAVED)
                self._host.keep(displaced)
        place, displaced.device_id = displaced.device_id, NO_PLACE
        self._lose(displaced, Event.DROP)
        return place

    def take_host_place(self) -> int:
        """Return a place on the host; the caller has seen that one is available."""
        if self._host.num_free:
            return self._host.take()
        is_kept = self._host.oldest is not None
        displaced = self._host.displace() if is_kept else self._twins.popitem()[0]
        place, displaced.host_id = displaced.host_id, NO_PLACE
        self._lose(displaced, Event.FORGET_HOST)
        if is_kept and displaced.state is State.DIRTY:
            self._unsaved[displaced] = None
        return place

    def _lose(self, block: Block, event: Event) -> None:
        """Have one of two copies go, or the only one."""
        if block.state is State.CLEAN:
            block.meet(event)
        else:
            block.meet(Event.FORGET)
            self._contents.forget(block)

    # ── what may go ──────────────────────────────────────────────────────────────────────────

    def keep(self, block: Block, *, is_old: bool = False) -> None:
        """Let a Block go that no table names and no copy touches, when its place is needed.

        It has a hash. One that was saved ahead of need `is_old`: as little used as it was before.
        """
        state = block.state
        if state is not State.HOST:
            self._device.keep(block, is_old=is_old)
        if state is State.DIRTY:
            self._unsaved[block] = None
            if is_old:
                self._unsaved.move_to_end(block, last=False)
        else:
            self._host.keep(block)

    def need(self, block: Block) -> None:
        """Let no place of a Block go that was kept, if it was."""
        self._device.need(block)
        self._host.need(block)
        self._unsaved.pop(block, None)

    def pair(self, block: Block) -> None:
        """Let the place on the host of a CLEAN Block go that some table names."""
        self._twins[block] = None

    def unpair(self, block: Block) -> None:
        """Let it go no more; it is CLEAN and named for the last time."""
        del self._twins[block]

    # ── for tests ────────────────────────────────────────────────────────────────────────────

    def check(self, blocks: Collection[Block]) -> None:
        """Assert that of these, all there are, exactly those may go that should."""
        for block in blocks:
            is_kept = block.refs == 0 and not block.is_moving
            is_alone = block.host_id == NO_PLACE
            assert (block in self._unsaved) == (is_kept and is_alone), block
            assert (block in self._twins) == (block.refs > 0 and block.state is State.CLEAN), block
