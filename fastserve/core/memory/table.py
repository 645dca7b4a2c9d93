"""BlockTable: the Blocks of one request in one epoch, by position.

Rules: written by the cache that keeps it, but for `num_sent` and `steps_in_flight`, which the
scheduler counts as plans go out and steps come back. Must not know: whose it is.
"""

from __future__ import annotations

from fastserve.core.memory.block import Block


class BlockTable:
    """Blocks in the order of the positions whose KV they hold.

    `num_sent` of them are known to the worker; `num_published` are findable as prefix.
    """

    __slots__ = ("blocks", "is_closed", "num_published", "num_sent", "steps_in_flight")

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks
        self.num_sent = 0
        self.num_published = len(blocks)
        self.steps_in_flight = 0
        self.is_closed = False
