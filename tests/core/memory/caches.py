"""KV memory on one tier over first come, first served, for tests of its parts."""

from __future__ import annotations

from fastserve.core.memory.claim import Claim
from fastserve.core.memory.eviction import Defer
from fastserve.core.memory.memory import KVCacheManager
from fastserve.core.memory.pool import BlockPool
from fastserve.core.memory.table import BlockTable
from fastserve.core.memory.victims import VictimRanking
from fastserve.core.policies.fcfs import FCFS
from fastserve.core.request import Arrival, Handle, Request, SamplingParams

BLOCK_SIZE = 4


def make_request(handle: int, prompt: list[int], **params: int) -> Request:
    """Return a request that has done nothing yet."""
    arrival = Arrival(prompt, SamplingParams(**params))  # type: ignore[arg-type]
    return Request(Handle(handle), arrival, max_output_tokens=8)


def make_cache(num_blocks: int = 8, *, is_enabled: bool = True) -> KVCacheManager:
    """Return a manager over an empty pool that lets no request without KV take any."""
    return KVCacheManager(
        BlockPool(num_blocks),
        BLOCK_SIZE,
        VictimRanking(FCFS()),
        Defer(),
        enable_prefix_caching=is_enabled,
    )


def compute(cache: KVCacheManager, request: Request, num_tokens: int) -> BlockTable:
    """Claim the blocks of the first tokens and have them computed."""
    assert cache.claim(request, num_tokens, {request.handle}) is Claim.MET
    table = request.table
    assert table is not None
    request.num_scheduled_tokens = num_tokens
    cache.advance(request, table, num_tokens)
    return table
