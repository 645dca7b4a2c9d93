"""Packing: one bounded scan of the policy's order, from claims to shares of a step.

Rules: an earlier request's claim on blocks comes before a later one's, met or not. KV is taken only
from requests that have not been scanned yet and whose estimated next schedule time is no sooner
than the claimant's; the head of the order may take from anyone. Two rules make livelock
impossible: a request that recomputes holds, from its start, the blocks to get beyond where it was
before, and cannot lose them until it has; and when the scan leaves room in the step, whoever
holds KV may fill it. So every recomputation yields a new token, and somebody can always run.
Decodes come first in a step, prefill chunks fill the rest of the token budget.
Must not know: what a plan looks like, samples, any time but `now`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import islice

from fastserve.core.memory.memory import KVCacheManager
from fastserve.core.memory.victims import VictimRanking
from fastserve.core.policies.protocol import Policy
from fastserve.core.request import Request
from fastserve.settings.scheduler import SchedulerConfig

SCAN_MARGIN = 64  # requests looked at beyond those that can run


class Packing:
    """The budget of one step; `chosen` are (request, num_tokens), best first."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache: KVCacheManager,
        policy: Policy,
        victims: VictimRanking,
        num_requests: int,
        now: float,
    ) -> None:
        self._cache = cache
        self._policy = policy
        self._now = now
        self._block_size = cache.block_size
        self._window = config.max_model_len
        self._is_chunked = config.enable_chunked_prefill
        slots = config.num_slots
        # Steps of disjoint requests are in flight: each takes its share, so that they fill evenly.
        self._max_seqs = min(config.max_num_seqs, -(-num_requests // slots))
        share = -(-config.max_num_batched_tokens // slots)
        self._max_tokens = (
            max(share, self._max_seqs) if self._is_chunked else config.max_num_batched_tokens
        )
        self._max_scan = config.max_num_seqs * slots + SCAN_MARGIN
        self._num_requests = num_requests
        self._max_in_flight = config.lookahead if slots == 1 else 0
        self._prefill_left = self._max_tokens
        self._blocks_left = cache.num_available
        self._leaving_left = cache.num_leaving
        self._seats_left = (config.max_live_seqs or num_requests) - cache.num_tables
        self._scanned: set[int] = set()
        self._newcomer_limit = sys.maxsize  # tokens that one without KV may lack; -1: closed
        self._victims = victims
        victims.begin_plan()
        self.chosen: list[tuple[Request, int]] = []

    def scan(self, order: Iterable[Request]) -> None:
        """Choose the requests of the step from the order, then from those that hold KV."""
        self._scan(islice(order, self._max_scan))
        if len(self.chosen) < self._max_seqs and len(self._scanned) < self._num_requests:
            self._scan(self._unscanned_holders(self._max_scan))
        if not self.chosen:
            self._scan(self._unscanned_holders(self._num_requests))

    def trimmed(self) -> list[tuple[Request, int]]:
        """Return the shares, prefill chunks cut to what the decodes leave of the budget."""
        num_decodes = sum(num_tokens == 1 for _, num_tokens in self.chosen)
        if num_decodes == len(self.chosen) or not self._is_chunked:
            return self.chosen
        left = self._max_tokens - num_decodes
        shares: list[tuple[Request, int]] = []
        for request, num_tokens in self.chosen:
            if num_tokens == 1:
                shares.append((request, 1))
            elif left:
                shares.append((request, min(num_tokens, left)))
                left -= shares[-1][1]
        return shares

    def _unscanned_holders(self, limit: int) -> list[Request]:
        holders = islice(self._cache.holders(), limit)
        return [request for request in holders if request.handle not in self._scanned]

    def _scan(self, order: Iterable[Request]) -> None:
        scanned, chosen = self._scanned, self.chosen
        max_seqs, max_in_flight = self._max_seqs, self._max_in_flight
        for request in order:
            if request.table is None and (
                self._newcomer_limit < 0
                or request.num_tokens - request.num_cached_tokens > self._newcomer_limit
            ):
                continue
            scanned.add(request.handle)
            num_tokens = request.num_tokens + request.num_pending_samples
            if request.steps_in_flight > max_in_flight or num_tokens >= request.max_num_tokens:
                continue
            num_tokens = self._admit(request)
            if num_tokens:
                chosen.append((request, num_tokens))
                if len(chosen) == max_seqs:
                    break

    def _admit(self, request: Request) -> int:
        """Return the tokens that a request may compute in this step; 0: not this time."""
        return self._claim(request) if request.table else self._claim_first(request)

    def _claim(self, request: Request) -> int:
        """Give a request the blocks of its next share and return its tokens; 0: not this time."""
        table = request.table
        assert table is not None
        scheduled = request.num_scheduled_tokens
        num_unscheduled = request.num_tokens + request.num_pending_samples - scheduled
        if num_unscheduled == 1 and scheduled < len(table.blocks) * self._block_size:
            return 1  # the common case: a decode whose block has room
        num_tokens = self._share(num_unscheduled)
        end = scheduled + num_tokens
        lacking = self._cache.num_blocks(end) - len(table.blocks)
        if lacking > 0:
            if self._take(request, lacking):
                self._cache.grow(table, lacking)
            else:
                room = len(table.blocks) * self._block_size - scheduled
                num_tokens = min(num_tokens, room) if self._is_chunked else 0
        if num_tokens > 1:
            self._prefill_left -= num_tokens
        return num_tokens

    def _claim_first(self, request: Request) -> int:
        """The same for a request without KV, which also needs a seat among the live."""
        # Behind a claim that is not met there is nothing for newcomers, and nobody is evicted for
        # one that the budget cannot hold.
        if self._blocks_left < 0 or not self._prefill_left:
            self._newcomer_limit = -1
            return 0
        can_run = self._share(request.num_tokens - request.num_cached_tokens)
        if not can_run or not self._take_seat(request):
            return 0
        return self._open(request)

    def _open(self, request: Request) -> int:
        """Start the table of a request and give it the blocks of its first share."""
        # Opened before anything is taken, so that nobody's KV which it shares can vanish meanwhile.
        blocks_left, available = self._blocks_left, self._cache.num_available
        table = self._cache.open(request)
        self._blocks_left -= available - self._cache.num_available
        start = request.num_computed_tokens
        num_tokens = self._share(request.num_tokens - start)
        lacking = self._num_first_blocks(request, start + num_tokens) - len(table.blocks)
        if not num_tokens:
            self._blocks_left = blocks_left
        if not num_tokens or not self._take(request, lacking):
            self._cache.close(table)
            request.table = None
            request.num_computed_tokens = request.num_scheduled_tokens = 0
            return 0
        self._cache.grow(table, lacking)
        self._seats_left -= 1
        if num_tokens > 1:
            self._prefill_left -= num_tokens
        return num_tokens

    def _num_first_blocks(self, request: Request, end: int) -> int:
        """Return the blocks that a request must hold to begin with a share up to `end`."""
        lost = min(request.num_lost_tokens + 1, request.num_tokens)
        reserved = min(self._policy.reserve_tokens(request), self._window)
        return self._cache.num_blocks(max(end, lost, reserved))

    def _share(self, num_unscheduled: int) -> int:
        """Return the tokens of a request's next share under the token budget."""
        if num_unscheduled == 1:
            return 1
        if self._is_chunked:
            return min(num_unscheduled, self._prefill_left)
        # A whole prompt may overshoot the budget by the decodes beside it: else it could wait
        # for ever for a step without any.
        return num_unscheduled if num_unscheduled <= self._prefill_left else 0

    def _take(self, request: Request, num_blocks: int) -> bool:
        """Claim blocks; a claim that is not met stands, and whoever comes later goes without."""
        while num_blocks > self._blocks_left + self._leaving_left:
            if not self._evict_for(request):
                break
        self._blocks_left -= num_blocks
        return self._blocks_left >= 0

    def _take_seat(self, request: Request) -> bool:
        return self._seats_left > 0 or self._evict_for(request)

    def _evict_for(self, request: Request) -> bool:
        """Take the KV of the coldest request, if it may lose it to this one."""
        victim = self._victim_for(request)
        if victim is not None:
            self._evict(victim)
        return victim is not None

    def _victim_for(self, request: Request) -> Request | None:
        victim = self._victims.coldest(self._now, self._scanned)
        is_head = len(self._scanned) == 1
        if victim is None or not (is_head or self._enst(victim) >= self._enst(request)):
            return None
        return victim

    def _evict(self, victim: Request) -> None:
        assert victim.table is not None
        available, leaving = self._cache.num_available, self._cache.num_leaving
        self._cache.close(victim.table)
        victim.restart()
        self._blocks_left += self._cache.num_available - available
        self._leaving_left += self._cache.num_leaving - leaving
        self._seats_left += 1

    def _enst(self, request: Request) -> float:
        return self._policy.estimated_next_schedule_time(request, self._now)
