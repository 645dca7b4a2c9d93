"""What preempting may cost when KV is short: the modes, as budgets and packings of their own.

Rules: a mode changes who may take blocks from whom, never the order. Must not know: plans, samples.
"""

from __future__ import annotations

from typing import Any

from fastserve.core.cost_model import CostModel
from fastserve.core.packing import Packing
from fastserve.core.request import Request

MAX_DEFERRED = 16  # newcomers that a plan tries to fit into free blocks before it leaves the rest


class RecomputeBudget:
    """Device seconds that newcomers may make others compute again: a share of those worked.

    Without a bound, requests promoted by starvation take each other's KV in turn, and most of the
    device goes into recomputation. A debt is worked off before the next newcomer may evict, so
    nobody is deferred for longer than the debt over the share. Share 0 is the paper's "defer",
    infinity its "recompute" (§4.3).
    """

    def __init__(self, cost_model: CostModel, *, share: float, max_chunk: int, window: int) -> None:
        self._cost_model = cost_model
        self._share = share
        self._max_chunk = max_chunk
        self._limit_s = cost_model.prefill_s(window, 0, max_chunk)
        self._credit_s = self._limit_s if share else 0.0

    @property
    def is_spent(self) -> bool:
        """Whether newcomers have to wait for blocks that come free by themselves."""
        return self._credit_s <= 0.0

    def earn(self, device_s: float) -> None:
        """Note a step's device seconds."""
        if self._share:
            self._credit_s = min(self._credit_s + self._share * device_s, self._limit_s)

    def spend(self, request: Request) -> None:
        """Note that what a request has computed is lost."""
        if self._share != float("inf"):
            cost_s = self._cost_model.prefill_s(request.num_computed_tokens, 0, self._max_chunk)
            self._credit_s = max(self._credit_s - cost_s, -self._limit_s)


class BudgetedPacking(Packing):
    """A request without KV may take that of others only while the budget lasts.

    One that may not is deferred: as if it had not been scanned, no claim of its stands, and the
    first request with KV counts as the head of the order. After the first, only those are tried
    whose tokens fit into what is free: small requests slip in where large ones have to wait, unless
    the policy keeps its order.
    """

    def __init__(self, *args: Any, budget: RecomputeBudget) -> None:
        super().__init__(*args)
        self._budget = budget
        self._may_evict = True
        self._is_deferred = False
        self._num_deferred = 0

    def _claim_first(self, request: Request) -> int:
        blocks_left = self._blocks_left
        # Whoever begins to pay may finish, in debt: half a claim would help nobody.
        self._may_evict, self._is_deferred = not self._budget.is_spent, False
        num_tokens = super()._claim_first(request)
        self._may_evict = True
        if self._is_deferred and not num_tokens:
            self._num_deferred += 1
            self._blocks_left = blocks_left
            num_free = blocks_left + self._leaving_left
            is_last = self._policy.keeps_order or self._num_deferred == MAX_DEFERRED
            self._newcomer_limit = -1 if is_last or num_free <= 0 else num_free * self._block_size
            self._scanned.discard(request.handle)
        return num_tokens

    def _victim_for(self, request: Request) -> Request | None:
        victim = super()._victim_for(request)
        if victim is not None and not self._may_evict:
            self._is_deferred = True
            return None
        return victim

    def _evict(self, victim: Request) -> None:
        self._budget.spend(victim)
        super()._evict(victim)


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
