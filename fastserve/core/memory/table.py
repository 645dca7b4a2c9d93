"""BlockTable: the Blocks of one request in one epoch, by position.

Rules: written by the memory room, but for `num_sent`, `is_known` and `steps_in_flight`, which the
scheduler counts as plans go out and steps come back. Must not know: whose it is.
"""

from __future__ import annotations

from fastserve.core.memory.block import ON_DEVICE, Block, State


class BlockTable:
    """Blocks in the order of the positions whose KV they hold.

    `num_sent` of them are known to the worker, which has heard of the request if it `is_known`;
    `num_published` are full. A table that `is_resident` has all its Blocks on the device, and none
    is moved. One that gives way to others `is_draining` while steps in flight touch it, and then
    `is_wanted` no more: its Blocks may go, until it `is_drained`. It is wanted again from the claim
    on that brings it back.
    """

    __slots__ = (
        "blocks",
        "is_closed",
        "is_drained",
        "is_draining",
        "is_known",
        "is_resident",
        "is_stuck",
        "is_wanted",
        "num_fetched",
        "num_loaded",
        "num_published",
        "num_saved",
        "num_sent",
        "number",
        "steps_in_flight",
        "waits_since",
    )

    def __init__(self, blocks: list[Block], number: int = 0) -> None:
        self.blocks = blocks
        self.number = number  # later tables have larger ones
        self.num_sent = 0
        self.is_known = False
        self.num_published = len(blocks)
        self.steps_in_flight = 0
        self.is_closed = False
        self.is_resident = True
        self.is_wanted = True
        self.is_draining = False
        self.is_drained = False
        self.is_stuck = False  # a copy to the host has failed: the next time it is dropped
        self.num_saved = 0  # full Blocks that were seen to be on the host
        self.num_fetched = 0  # Blocks brought in ahead of need since it last gave way
        self.num_loaded = 0  # Blocks brought in since it last gave way
        self.waits_since: float | None = None  # when a step was to have it, and it was not there

    @property
    def is_on_device(self) -> bool:
        """Whether a step could read all of it."""
        return all(block.state in ON_DEVICE for block in self.blocks)

    @property
    def is_lost(self) -> bool:
        """Whether a copy that failed took some of it."""
        return any(block.state is State.GONE for block in self.blocks)

    def on_host(self) -> list[Block]:
        """Return the Blocks that only the host has."""
        return [block for block in self.blocks if block.state is State.HOST]
