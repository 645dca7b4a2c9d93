"""Claims in any order over the memory room, held against naive accounts of the same blocks."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastserve.core.memory.block import Block
from fastserve.core.memory.claim import Claim
from fastserve.core.memory.eviction import Defer, Eviction, Recompute, RecomputeBudget
from fastserve.core.memory.memory import KVCacheManager
from fastserve.core.memory.pool import BlockPool
from fastserve.core.memory.table import BlockTable
from fastserve.core.memory.victims import VictimRanking
from fastserve.core.policies.fcfs import FCFS
from fastserve.core.request import Arrival, FinishReason, Handle, Request, SamplingParams
from tests.core.harness import UNIT_COST

MAX_TOKENS = 20


class Step(NamedTuple):
    """Tokens of one request on their way."""

    request: Request
    table: BlockTable
    num_tokens: int


def eviction_of(name: str) -> Eviction:
    """Return a part by name; `recompute` never runs out of budget, `spent` never has any."""
    if name == "defer":
        return Defer()
    share = float("inf") if name == "recompute" else 0.0
    return Recompute(RecomputeBudget(UNIT_COST, share=share, max_chunk=8, window=MAX_TOKENS))


def look(cache: KVCacheManager, requests: list[Request]) -> dict[str, Any]:
    """Return all that memory and requests hold as plain values, the order of cached blocks too."""
    pool = cache.pool
    return {
        "free": list(pool.device._given_back),
        "touched": pool.device._num_touched,
        "cached": [(block.device_id, block.hash) for block in pool.device.kept()],
        "used": {
            block.device_id: (block.refs, block.hash)
            for table in cache._tables._owners
            for block in table.blocks
        },
        "findable": {
            block_hash: block.device_id for block_hash, block in pool._contents._by_hash.items()
        },
        "tables": [
            ([block.device_id for block in table.blocks], table.is_closed, request.handle)
            for table, request in cache._tables._owners.items()
        ],
        "counters": (cache.num_tables, cache.num_leaving, pool.device.num_available),
        "requests": [
            (r.handle, r.epoch, r.num_computed_tokens, r.num_scheduled_tokens, r.table is None)
            for r in requests
        ],
    }


class ClaimsInAnyOrder(RuleBasedStateMachine):
    """Requests claim, compute, lose and give back; some have a beginning in common."""

    @initialize(
        num_blocks=st.sampled_from((4, 8, 14)),
        block_size=st.sampled_from((1, 2, 3)),
        max_tables=st.sampled_from((None, 1, 2)),
        eviction=st.sampled_from(("defer", "recompute", "spent")),
        has_prefix_cache=st.booleans(),
    )
    def build(
        self,
        num_blocks: int,
        block_size: int,
        max_tables: int | None,
        eviction: str,
        has_prefix_cache: bool,
    ) -> None:
        """Start with an empty pool."""
        self.policy = FCFS()
        self.cache = KVCacheManager(
            BlockPool(num_blocks),
            block_size,
            VictimRanking(self.policy),
            eviction_of(eviction),
            max_tables=max_tables,
            enable_prefix_caching=has_prefix_cache,
        )
        self.requests: list[Request] = []
        self.flying: list[Step] = []
        self.scanned: set[int] = set()
        self.num_made = 0
        self.contents: dict[Block, tuple[int, ...]] = {}  # what a findable block stands for

    @rule(
        lengths=st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=3),
        change_at=st.sampled_from((0, 5, MAX_TOKENS)),
    )
    def arrive(self, lengths: list[int], change_at: int) -> None:
        """Requests come whose ids differ from all others' from some position on."""
        for length in lengths:
            own = 100 * (self.num_made + 1)
            prompt = [p if p < change_at else own + p for p in range(length)]
            request = Request(
                Handle(self.num_made),
                Arrival(prompt, SamplingParams()),
                max_output_tokens=MAX_TOKENS,
            )
            self.num_made += 1
            self.requests.append(request)
            self.policy.admit(request, 0.0)

    @precondition(lambda self: self.requests)
    @rule(
        turns=st.lists(
            st.tuples(st.integers(0, 9), st.integers(1, 9), st.booleans()), min_size=1, max_size=6
        )
    )
    def plan(self, turns: list[tuple[int, int, bool]]) -> None:
        """A plan looks at requests in some order; what is claimed may go into a step."""
        self.cache.begin_plan(0.0)
        self.scanned.clear()
        assert self.cache.num_left == self.cache.pool.device.num_available
        for number, num_tokens, is_submitted in turns:
            request = self.requests[number % len(self.requests)]
            if request.handle not in self.scanned:
                self.claim(request, num_tokens)
                if is_submitted and request.table is not None:
                    self.submit(request, request.table)

    def claim(self, request: Request, num_tokens: int) -> None:
        """Claim the blocks of the next tokens and hold the outcome against what was there."""
        self.scanned.add(request.handle)
        had_kv = request.table is not None
        if not had_kv and self.cache.num_left < 0:
            return  # the packer asks no more for a request without KV then
        found = self.probe(request)
        start = request.num_scheduled_tokens if had_kv else found
        end = min(start + num_tokens, request.num_tokens)
        twin, requests = copy.deepcopy((self.cache, self.requests))
        epochs = {r.handle: r.epoch for r in self.requests}
        num_left, num_standing = self.cache.num_left, self.cache._reclaimer._num_standing
        outcome = self.cache.claim(request, end, self.scanned)

        lost = [r.handle for r in self.requests if r.epoch != epochs[r.handle]]
        assert not self.scanned & set(lost), "taken from a request that was looked at before"
        assert len(self.scanned) == 1 or all(handle > request.handle for handle in lost)
        assert not lost or outcome is not Claim.DEFERRED
        if outcome is Claim.MET:
            assert request.table is not None
            assert len(request.table.blocks) * self.cache.block_size >= end
            assert had_kv or request.num_computed_tokens == found
            assert had_kv or request.num_scheduled_tokens == found
            # Claims that stand are not served with what is met after them.
            assert self.cache.num_left >= min(num_left, 0)
            return
        # Not met, it leaves everything as the loss of the victims alone would.
        for handle in sorted(lost, reverse=True):  # first come, first served: the youngest first
            victim = next(r for r in requests if r.handle == handle)
            twin.release(victim)
            victim.restart()
        assert look(self.cache, self.requests) == look(twin, requests)
        if outcome is Claim.DEFERRED:
            assert self.cache._reclaimer._num_standing == num_standing
            assert not had_kv, "a request that has begun goes on"
        elif had_kv or self.cache._tables.has_seat:
            assert self.cache.num_left < 0, "what is not met does not stand"

    def probe(self, request: Request) -> int:
        """Probe twice: nothing moves, and it is what a search over all contents finds."""
        before = look(self.cache, self.requests)
        found = self.cache.probe(request)
        assert look(self.cache, self.requests) == before
        size = self.cache.block_size
        named = self.cache._tables.blocks()
        alive = {*self.cache.pool.device.kept(), *named}
        contents = {self.contents[block] for block in alive if block in self.contents}
        ids = tuple(request.token_ids(0, request.num_tokens))
        num_blocks = 0
        while (num_blocks + 1) * size < len(ids) and ids[: (num_blocks + 1) * size] in contents:
            num_blocks += 1
        assert found == num_blocks * size
        return found

    def submit(self, request: Request, table: BlockTable) -> None:
        """Put the tokens whose blocks are there into a step."""
        room = len(table.blocks) * self.cache.block_size
        num_tokens = min(room, request.num_tokens) - request.num_scheduled_tokens
        if num_tokens > 0:
            request.num_scheduled_tokens += num_tokens
            table.steps_in_flight += 1
            self.flying.append(Step(request, table, num_tokens))

    @precondition(lambda self: self.flying)
    @rule(count=st.integers(1, 4), has_sample=st.booleans())
    def land(self, count: int, has_sample: bool) -> None:
        """The oldest steps are done."""
        for _ in range(min(count, len(self.flying))):
            self.land_oldest(has_sample)

    def land_oldest(self, has_sample: bool) -> None:
        """Confirm what a step computed, or give back what it was the last to touch."""
        request, table, num_tokens = self.flying.pop(0)
        table.steps_in_flight -= 1
        if table.is_closed:
            self.cache.landed(table)
            return
        end = request.num_computed_tokens + num_tokens
        request.max_computed_tokens = max(request.max_computed_tokens, end)
        self.cache.advance(request, table, end)
        self.cache.worked(1.0)
        size = self.cache.block_size
        for index, block in enumerate(table.blocks[: end // size]):
            if block.hash is not None:
                ids = tuple(request.token_ids(0, (index + 1) * size))
                assert self.contents.setdefault(block, ids) == ids
        if has_sample and request.num_tokens < 2 * MAX_TOKENS:
            request.append(7)

    @precondition(lambda self: self.requests)
    @rule(number=st.integers(0, 9))
    def end(self, number: int) -> None:
        """A request ends, perhaps with steps in flight."""
        request = self.requests.pop(number % len(self.requests))
        self.policy.finished(request, FinishReason.STOP)
        self.cache.release(request)
        assert request.table is None

    @invariant()
    def everything_has_one_owner(self) -> None:
        """Tables, blocks and counters agree."""
        if hasattr(self, "cache"):
            self.cache.check(self.requests)

    def teardown(self) -> None:
        """All blocks come home."""
        if not hasattr(self, "cache"):
            return
        while self.requests:
            request = self.requests.pop()
            self.cache.release(request)
        while self.flying:
            self.land_oldest(has_sample=False)
        self.cache.check([])
        assert self.cache.pool.device.num_used == 0
        assert (self.cache.num_tables, self.cache.num_leaving) == (0, 0)


TestClaimsInAnyOrder = pytest.mark.no_cover(ClaimsInAnyOrder.TestCase)
TestClaimsInAnyOrder.settings = settings(max_examples=80)  # each tries every part of eviction
