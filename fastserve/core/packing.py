"""Packing: one bounded scan of the policy's order, which divides the seats and tokens of a step.

Rules: an earlier request's claim on blocks comes before a later one's, met or not. Two rules make
livelock impossible: a request that recomputes holds, from its start, the blocks to get beyond where
it was before, and cannot lose them until it has; and when the scan leaves room in the step, the
other requests whose KV is there may fill it. So every recomputation yields a new token, and some
request can always run. One that may not come back yet is passed over, as if it had not been
there, and comes back all the same where no other asks for anything. Decodes come first in a step,
prefill chunks fill the rest of the token budget. Must not know: which blocks there are, what a plan
looks like, samples, time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from math import ceil

from fastserve.core.memory.claim import Claim
from fastserve.core.memory.memory import KVCacheManager
from fastserve.core.memory.table import BlockTable
from fastserve.core.policies.reservation import Reservation
from fastserve.core.request import Request
from fastserve.settings.scheduler import SchedulerConfig

SCAN_MARGIN = 64  # requests looked at beyond those that can run
MAX_DEFERRED = 16  # per plan, before no request without KV is tried any more


class Packing:
    """The budget of one step; `chosen` are (request, num_tokens), best first."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache: KVCacheManager,
        reservation: Reservation,
        num_requests: int,
    ) -> None:
        self._cache = cache
        self._reservation = reservation
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
        self._scanned: set[int] = set()
        self._put_off: dict[int, Request] = {}  # that may not come back yet
        self._is_patient = True
        # Those that a request without KV may lack to be tried; None: no such request is admitted.
        self._max_missing_tokens: int | None = sys.maxsize
        self._num_deferred = 0
        self.chosen: list[tuple[Request, int]] = []

    def scan(self, order: Iterable[Request]) -> None:
        """Choose the requests of the step from the order, then from those that hold KV."""
        self._scan(islice(order, self._max_scan))
        if not self._is_full and len(self._scanned) < self._num_requests:
            self._scan(islice(self._unscanned_residents(), self._max_scan))
        if not self._is_full and not self.chosen:
            self._scan(self._unscanned_holders())
        if not self._scanned and self._put_off:
            self._is_patient = False
            self._scan(islice(self._put_off.values(), 1))

    def trimmed(self) -> list[tuple[Request, int]]:
        """Return the shares, prefill chunks cut to what the decodes leave of the budget."""
        has_prefill = self._prefill_left < self._max_tokens
        if not has_prefill or not self._is_chunked:
            return self.chosen
        left = self._max_tokens - sum(num_tokens == 1 for _, num_tokens in self.chosen)
        shares: list[tuple[Request, int]] = []
        for request, num_tokens in self.chosen:
            if num_tokens == 1:
                shares.append((request, 1))
            elif left:
                shares.append((request, min(num_tokens, left)))
                left -= shares[-1][1]
        return shares

    @property
    def _is_full(self) -> bool:
        return len(self.chosen) == self._max_seqs

    def _unscanned_residents(self) -> Iterator[Request]:
        for request in self._cache.residents():
            if request.handle not in self._scanned and request.handle not in self._put_off:
                yield request

    def _unscanned_holders(self) -> list[Request]:
        seen = self._scanned | self._put_off.keys()
        return [request for request in self._cache.holders() if request.handle not in seen]

    def _scan(self, order: Iterable[Request]) -> None:
        """Choose from requests of which none was scanned."""
        scanned, chosen, block_size = self._scanned, self.chosen, self._block_size
        max_seqs, max_in_flight = self._max_seqs, self._max_in_flight
        for request in order:
            table = request.table
            if table is None and (
                self._max_missing_tokens is None
                or request.num_tokens - request.num_cached_tokens > self._max_missing_tokens
            ):
                continue
            scanned.add(request.handle)
            num_tokens = request.num_tokens + request.num_pending_samples
            if request.steps_in_flight > max_in_flight or num_tokens >= request.max_num_tokens:
                continue
            if table is None:
                num_tokens = self._begin(request)
            else:
                scheduled = request.num_scheduled_tokens
                num_tokens -= scheduled
                # The common case is a decode whose block has room.
                if (
                    num_tokens > 1
                    or not table.is_resident
                    or scheduled >= len(table.blocks) * block_size
                ):
                    num_tokens = self._go_on(request, table, num_tokens)
            if not num_tokens:
                continue
            chosen.append((request, num_tokens))
            if len(chosen) == max_seqs:
                break

    def _go_on(self, request: Request, table: BlockTable, num_unscheduled: int) -> int:
        """Return the tokens that a request with KV may compute in this step; 0: not this time."""
        scheduled = request.num_scheduled_tokens
        num_tokens = self._share(num_unscheduled)
        claim = self._cache.claim(
            request, scheduled + num_tokens, self._scanned, is_patient=self._is_patient
        )
        if not table.is_resident:
            if claim is Claim.DEFERRED:
                self._scanned.discard(request.handle)
                self._put_off[request.handle] = request
                if self._reservation.keeps_order:
                    self._max_missing_tokens = None
            return 0
        if claim is not Claim.MET:
            room = len(table.blocks) * self._block_size - scheduled
            num_tokens = min(num_tokens, room) if self._is_chunked else 0
        if num_tokens > 1:
            self._prefill_left -= num_tokens
        return num_tokens

    def _begin(self, request: Request) -> int:
        """The same for a request without KV, which also needs a seat among those with."""
        cache = self._cache
        # A claim that stands leaves nothing for requests without KV, and none is evicted for a
        # request that the budget cannot hold.
        if cache.num_left < 0 or not self._prefill_left:
            self._max_missing_tokens = None
            return 0
        start = cache.probe(request)
        num_tokens = self._share(request.num_tokens - start)
        if not num_tokens:
            return 0
        reserved = min(self._reservation.num_tokens(request), self._window)
        num_missing = request.num_tokens - start
        spare_tokens = self._reservation.spare_share * num_missing * len(self.chosen)
        num_spare = ceil(spare_tokens / self._block_size)
        end = max(start + num_tokens, reserved)
        claim = cache.claim(request, end, self._scanned, num_spare=num_spare)
        if claim is Claim.DEFERRED:
            self._defer(request, num_spare)
        if claim is not Claim.MET:
            return 0
        if num_tokens > 1:
            self._prefill_left -= num_tokens
        return num_tokens

    def _defer(self, request: Request, num_spare: int) -> None:
        """Pass over a request that may not take KV, as if it had not been scanned.

        The first request with KV counts as the head of the order then. Of those without, only such
        are tried whose missing tokens fit into free blocks, unless the policy keeps its order.
        """
        self._scanned.discard(request.handle)
        self._num_deferred += 1
        num_free = self._cache.num_left + self._cache.num_leaving - num_spare
        is_last = self._reservation.keeps_order or self._num_deferred == MAX_DEFERRED
        self._max_missing_tokens = None if is_last or num_free <= 0 else num_free * self._block_size

    def _share(self, num_unscheduled: int) -> int:
        """Return the tokens of a request's next share under the token budget."""
        if num_unscheduled == 1:
            return 1
        if self._is_chunked:
            return min(num_unscheduled, self._prefill_left)
        # A whole prompt may overshoot the budget by the decodes beside it: else it could wait
        # for ever for a step without any.
        return num_unscheduled if num_unscheduled <= self._prefill_left else 0
