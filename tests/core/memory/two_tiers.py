"""KV memory on two tiers, and the copies it begins, for tests of its parts."""

from __future__ import annotations

from dataclasses import replace

from fastserve.core.build import build_cache
from fastserve.core.memory.block import State
from fastserve.core.memory.claim import Claim
from fastserve.core.memory.memory import KVCacheManager
from fastserve.core.memory.table import BlockTable
from fastserve.core.messages import Copy, CopyDirection
from fastserve.core.policies.fcfs import FCFS
from fastserve.core.policies.protocol import Coldness
from fastserve.core.request import Arrival, Handle, Request, SamplingParams
from tests.core.harness import UNIT_COST, small_config

BLOCK_SIZE = 4
OUT, IN = CopyDirection.SWAP_OUT, CopyDirection.SWAP_IN
# A block is copied sooner than computed.
COSTS = replace(UNIT_COST, prefill_token_s=0.2, copy_block_s=0.01)


class Room:
    """KV memory that is first come first served, and the copies it has begun."""

    def __init__(
        self, num_device: int, num_host: int, mode: str = "reactive", policy: FCFS | None = None
    ) -> None:
        config = small_config(preemption_mode=mode, enable_prefix_caching=True)
        self.cache: KVCacheManager = build_cache(
            config, COSTS, policy or FCFS(), num_device, num_host
        )
        self.requests: list[Request] = []

    def request(self, num_tokens: int, *, shared: int = 0) -> Request:
        """Return a new request; its first ids may be those that all others have."""
        own = 1000 * (len(self.requests) + 1)
        ids = [p if p < shared else own + p for p in range(num_tokens)]
        arrival = Arrival(ids, SamplingParams())
        request = Request(Handle(len(self.requests)), arrival, max_output_tokens=8)
        self.requests.append(request)
        return request

    def claim(
        self,
        request: Request,
        *,
        after: tuple[int, ...] = (),
        now: float = 0.0,
        is_patient: bool = False,
    ) -> Claim:
        """Claim all that a request needs, as the head of the order or behind others."""
        if not after:
            self.cache.begin_plan(now)
        scanned = {request.handle, *after}
        outcome = self.cache.claim(request, request.num_tokens, scanned, is_patient=is_patient)
        self.cache.check(self.requests)
        return outcome

    def compute(self, num_tokens: int, *, shared: int = 0) -> tuple[Request, BlockTable]:
        """Return a new request all of whose ids have KV on the device."""
        request = self.request(num_tokens, shared=shared)
        assert self.claim(request) is Claim.MET
        table = request.table
        assert table is not None
        request.num_scheduled_tokens = request.max_computed_tokens = num_tokens
        self.cache.advance(request, table, num_tokens)
        return request, table

    def end(self, request: Request) -> None:
        """End a request."""
        self.cache.release(request)
        self.cache.check(self.requests)

    def begun(self) -> tuple[Copy, ...]:
        """Return the copies that are to begin."""
        return self.cache.copies(0.0)

    def report(self, *copies: Copy, has_failed: bool = False) -> None:
        """Report copies as done."""
        for copy in copies:
            self.cache.copied(copy.copy_id, has_failed=has_failed)
        self.cache.check(self.requests)

    def run(self, head: Request) -> None:
        """Plan until the claim of the head of the order is met, each copy done at once."""
        while self.claim(head) is not Claim.MET:
            copies = self.begun()
            assert copies, "nothing can run and nothing is in flight"
            self.report(*copies)

    def swap_out(self, request: Request) -> None:
        """Have a head that needs the whole device take it, and go again."""
        taker = self.request(self.cache.pool.device.num_blocks * BLOCK_SIZE)
        self.run(taker)
        assert states(request) == {State.HOST}
        self.end(taker)


def states(request: Request) -> set[State]:
    """Return the states of the Blocks of a request."""
    assert request.table is not None
    return {block.state for block in request.table.blocks}


def save_all(table: BlockTable, room: Room) -> None:
    """Have all full Blocks of a table on both tiers."""
    for block in table.blocks:
        room.cache.pool.save(block)
        room.cache.pool.saved(block)


def gone(room: Room) -> tuple[Request, float]:
    """Return a request all of whose KV is on the host, and how long it is to stay away."""
    away, table = room.compute(12)
    room.swap_out(away)
    assert room.cache._swapper is not None
    return away, room.cache._swapper.wait_s(len(table.blocks))


class OldestGoes(FCFS):
    """First come, first to lose its KV."""

    def coldness(self, request: Request, now: float) -> Coldness:
        """Return the age."""
        return (-request.handle,)
