"""Orca (OSDI 2022): first come, first served, with the longest possible KV reserved at the start.

The paper's main baseline. A request that has begun can never run out of blocks, and few can begin.
"""

from __future__ import annotations

from fastserve.core.policies.fcfs import FCFS
from fastserve.core.request import Request


class Orca(FCFS):
    """FCFS that reserves prompt + max_tokens."""

    def reserve_tokens(self, request: Request) -> int:
        """Return everything the request could ever need."""
        return request.max_num_tokens
