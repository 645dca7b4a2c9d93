"""Eviction: whether a request may take KV that another one holds, and what that costs.

Rules: a part says whether, never from which request first (victims.py) nor in which order requests
are served. Must not know: blocks, plans, samples.
"""

from __future__ import annotations

from typing import Protocol

from fastserve.core.cost_model import CostModel
from fastserve.core.request import Request


class Eviction(Protocol):
    """What may be taken from which request."""

    def may_take(self, victim: Request, claimant: Request) -> bool:
        """Return whether the claimant may take the KV of the victim.

        Asked once per claim, for its first victim: a claim that has taken KV takes what it lacks.
        """

    def took(self, victim: Request) -> None:
        """Note that a victim loses its KV; its counters still say how much."""

    def worked(self, device_s: float) -> None:
        """Note the device seconds of a step."""


class Defer:
    """Only requests that hold KV take from others (§4.3, "defer"): lost KV stays rare."""

    def may_take(self, victim: Request, claimant: Request) -> bool:
        """Let a request that has begun go on."""
        return claimant.table is not None

    def took(self, victim: Request) -> None:
        """What it costs plays no part."""

    def worked(self, device_s: float) -> None:
        """Nothing is earned."""


class RecomputeBudget:
    """Device seconds that may go into computing lost KV again: a share of those worked.

    Without a bound, requests promoted by starvation take each other's KV in turn, and most of the
    device goes into recomputation. It starts with the seconds of one window's prefill, which is
    also its limit, in credit as in debt; so a debt lasts no longer than the limit over the share.
    """

    def __init__(self, cost_model: CostModel, *, share: float, max_chunk: int, window: int) -> None:
        self._cost_model = cost_model
        self._share = share
        self._max_chunk = max_chunk
        self._limit_s = cost_model.prefill_s(window, 0, max_chunk)
        self._credit_s = self._limit_s if share else 0.0

    @property
    def is_spent(self) -> bool:
        """Whether there is no credit."""
        return self._credit_s <= 0.0

    def earn(self, device_s: float) -> None:
        """Note a step's device seconds."""
        if self._share:
            self._credit_s = min(self._credit_s + self._share * device_s, self._limit_s)

    def spend(self, num_tokens: int) -> None:
        """Note that the KV of so many tokens, from the first on, is lost."""
        if self._share != float("inf"):
            cost_s = self._cost_model.prefill_s(num_tokens, 0, self._max_chunk)
            self._credit_s = max(self._credit_s - cost_s, -self._limit_s)


class Recompute:
    """A request without KV takes that of others while the budget lasts; it is computed again.

    The budget is checked once per claim, which may overdraw it. A share of infinity is the paper's
    "recompute" (§4.3).
    """

    def __init__(self, budget: RecomputeBudget) -> None:
        self._budget = budget

    def may_take(self, victim: Request, claimant: Request) -> bool:
        """Let a request that has begun go on, and one that has not if there is credit."""
        return claimant.table is not None or not self._budget.is_spent

    def took(self, victim: Request) -> None:
        """Pay for what the victim has computed."""
        self._budget.spend(victim.num_computed_tokens)

    def worked(self, device_s: float) -> None:
        """Earn the share of a step."""
        self._budget.earn(device_s)
