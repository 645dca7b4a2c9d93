"""What a request must be given to begin: which of its blocks, what beside, whether before others.

Must not know: blocks, which other requests wait.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.core.request import Request


@dataclass(frozen=True, slots=True)
class Reservation:
    """The terms on which requests without KV begin.

    `keeps_order`: one that memory makes wait holds up those behind it, even where they would fit.
    `is_whole`: its longest possible KV is held from the start, so it never runs out of blocks.
    `spare_share`: of the tokens that one has to compute before it goes on; it begins where room for
    so many more is left to each that runs ahead of it, and takes no KV. What leads the order does
    as if this were 0.
    """

    keeps_order: bool = False
    is_whole: bool = False
    spare_share: float = 0.0

    def num_tokens(self, request: Request) -> int:
        """Return the positions to hold blocks for from the start; 0: blocks on demand."""
        return request.max_num_tokens if self.is_whole else 0


ON_DEMAND = Reservation()
ON_DEMAND_IN_ORDER = Reservation(keeps_order=True)
WHOLE_IN_ORDER = Reservation(keeps_order=True, is_whole=True)
