"""Eviction: how a request gives way to one that takes its KV, if it does at all.

Rules: a part says how, never from which request first (victims.py), nor by how much, nor in which
order requests are served. Must not know: blocks, plans, samples.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Protocol

from fastserve.core.cost_model import CostModel
from fastserve.core.request import Request


class Verdict(Enum):
    """What becomes of the KV of a victim."""

    KEEP = auto()
    DROP = auto()  # it is computed again
    SWAP = auto()  # what of it is in the way goes to the host


class Eviction(Protocol):
    """What may be taken from which request."""

    def judge(self, victim: Request, claimant: Request, *, can_swap: bool) -> Verdict:
        """Return what becomes of the victim's KV if the claimant is short of blocks.

        `can_swap`: there is a host tier, with a place where one is needed.
        """

    def dropped(self, victim: Request) -> None:
        """Note that a victim loses its KV; its counters still say how much."""

    def worked(self, device_s: float) -> None:
        """Note the device seconds of a step."""


class Defer:
    """Only requests that hold KV take from others (§4.3, "defer"): lost KV stays rare."""

    def judge(self, victim: Request, claimant: Request, *, can_swap: bool) -> Verdict:
        """Let a request that has begun go on."""
        return Verdict.KEEP if claimant.table is None else Verdict.DROP

    def dropped(self, victim: Request) -> None:
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

    A share of infinity is the paper's "recompute" (§4.3).
    """

    def __init__(self, budget: RecomputeBudget) -> None:
        self._budget = budget

    def judge(self, victim: Request, claimant: Request, *, can_swap: bool) -> Verdict:
        """Let a request that has begun go on, and one that has not if there is credit."""
        is_refused = claimant.table is None and self._budget.is_spent
        return Verdict.KEEP if is_refused else Verdict.DROP

    def dropped(self, victim: Request) -> None:
        """Pay for what the victim has computed."""
        self._budget.spend(victim.num_computed_tokens)

    def worked(self, device_s: float) -> None:
        """Earn the share of a step."""
        self._budget.earn(device_s)


class Swap:
    """KV goes to the host while there is room, unless it is computed again sooner than copied.

    Both ways count, though they run beside compute: while a copy runs nobody has its places.
    Without room on the host the `fallback` decides.
    """

    def __init__(self, cost_model: CostModel, block_size: int, fallback: Eviction) -> None:
        self._cost_model = cost_model
        self._block_size = block_size
        self._fallback = fallback

    def judge(self, victim: Request, claimant: Request, *, can_swap: bool) -> Verdict:
        """Swap a victim that has given way before, or that is sooner copied than computed."""
        if can_swap and self._is_sooner_copied(victim):
            return Verdict.SWAP
        verdict = self._fallback.judge(victim, claimant, can_swap=can_swap)
        return Verdict.SWAP if can_swap and verdict is Verdict.KEEP else verdict

    def _is_sooner_copied(self, victim: Request) -> bool:
        if victim.table is not None and not victim.table.is_resident:
            return True
        num_tokens = victim.num_computed_tokens
        copy_s = 2.0 * self._cost_model.copy_s(-(-num_tokens // self._block_size))
        return copy_s <= self._cost_model.added_prefill_s(num_tokens, 0)

    def dropped(self, victim: Request) -> None:
        """Tell the fallback."""
        self._fallback.dropped(victim)

    def worked(self, device_s: float) -> None:
        """Tell the fallback."""
        self._fallback.worked(device_s)
