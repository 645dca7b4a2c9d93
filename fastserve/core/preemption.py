"""What becomes of packing when KV is short: the preemption modes that are not plain recomputation.

Rules: a mode changes who may take blocks from whom, never the order. Must not know: plans, samples.
"""

from __future__ import annotations

from typing import Any

from fastserve.core.packing import Packing
from fastserve.core.request import Request


class DeferPacking(Packing):
    """Newcomers wait until blocks are free: nobody loses KV to one that has none yet.

    The paper's "defer" (§4.3): preempted requests fill the memory, and later ones queue behind it.
    """

    def _take_seat(self, request: Request) -> bool:
        return self._seats_left > 0

    def _claim_first(self, request: Request) -> int:
        blocks_left = self._blocks_left
        num_tokens = super()._claim_first(request)
        if not num_tokens:
            # As if it had not been scanned: no claim stands, and the next may be the head.
            self._blocks_left = blocks_left
            self._scanned.discard(request.handle)
        return num_tokens

    def _take(self, request: Request, num_blocks: int) -> bool:
        assert request.table is not None
        is_new = request.table.num_sent == 0
        if is_new and num_blocks > self._blocks_left:
            return False
        return super()._take(request, num_blocks)


class IdealPacking(Packing):
    """KV moves at once and for nothing: only the requests of the step must fit on the device.

    The bound that no swapping reaches, for the simulator alone: the pool stands for both tiers, and
    `num_resident_blocks` for the device.
    """

    def __init__(self, *args: Any, num_resident_blocks: int) -> None:
        super().__init__(*args)
        self._resident_left = num_resident_blocks

    def _admit(self, request: Request) -> int:
        if self._resident_left <= 0:
            return 0
        num_tokens = super()._admit(request)
        if num_tokens:
            assert request.table is not None
            self._resident_left -= len(request.table.blocks)
            if self._resident_left < 0:
                return 0
        return num_tokens
