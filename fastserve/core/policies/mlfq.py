"""The paper's scheduler (§4.2): a multi-level feedback queue, with or without skip-join.

Output lengths are unknown, prompt lengths are known. Level i has the quantum q₁ · ratioⁱ. With
skip-join a request joins the highest level whose quantum covers its whole prefill; it is billed
the device seconds of every step it takes part in; when its quantum cannot hold another iteration
it is demoted, past levels that could not hold one either; when it has not run for
`starvation_limit` seconds it is promoted to level 0. Within a level: first in, first out.
Preemption falls out: not to be among the first of the order is not to be in the next plan.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from fastserve.core.cost_model import CostModel
from fastserve.core.policies.protocol import PolicyStats, StepBill
from fastserve.core.request import Request

MAX_CHECKS_PER_PLAN = 256  # of deadlines: no step could run more of those that starve at once


@dataclass(slots=True)
class _Account:
    """Where a request stands."""

    level: int
    used_s: float
    last_ran_at: float


class MLFQ:
    """Levels of FIFO queues; level 0 runs first."""

    keeps_order = False

    def __init__(
        self,
        cost_model: CostModel,
        *,
        quantum_s: float,
        quantum_ratio: float,
        starvation_limit: float,
        max_num_seqs: int,
        max_chunk: int,
        skip_join: bool,
        skip_demotion: bool = True,
        steps_between_promotions: int = 0,
    ) -> None:
        """Take q₁ and α in seconds; `max_chunk` is the longest prefill share of one step.

        Without `skip_demotion` a request falls by one level only, and those that starve may be
        looked for every so many steps only: so does the paper's public artifact.
        """
        self._cost_model = cost_model
        self._quanta = [quantum_s]
        self._quantum_ratio = quantum_ratio
        self._starvation_limit = starvation_limit
        self._max_num_seqs = max_num_seqs
        self._max_chunk = max_chunk
        self._skip_join = skip_join
        self._skip_demotion = skip_demotion
        self._steps_between_promotions = steps_between_promotions
        self._steps_to_promotion = 0
        self._levels: list[dict[int, Request]] = [{}]
        self._accounts: dict[int, _Account] = {}
        self._deadlines: list[tuple[float, int]] = []  # lazy: checked against the account when due
        self._fall_s: list[float] | None = None  # valid until a queue changes
        self._num_demotions = 0
        self._num_promotions = 0

    def admit(self, request: Request, now: float) -> None:
        """Join the level that the prefill time calls for (skip-join), or the highest."""
        level = self._level_holding(self._prefill_s(request)) if self._skip_join else 0
        self._fall_s = None
        self._accounts[request.handle] = _Account(level, 0.0, now)
        self._levels[level][request.handle] = request
        if level:
            self._watch(request.handle, now)

    def charge(self, bill: StepBill, now: float) -> None:
        """Bill the whole step to each that took part; demote those whose quantum is spent."""
        self._steps_to_promotion -= 1
        device_s = bill.device_s
        accounts, quanta = self._accounts, self._quanta
        for request, _ in bill.shares:
            account = accounts[request.handle]
            account.last_ran_at = now
            account.used_s += device_s
            next_s = self._next_iteration_s(request)
            if account.used_s + next_s > quanta[account.level]:
                self._demote(request, account, next_s, now)

    def remove(self, request: Request) -> None:
        """Leave the queues."""
        self._fall_s = None
        account = self._accounts.pop(request.handle)
        del self._levels[account.level][request.handle]

    def ordered(self, now: float) -> Iterator[Request]:
        """Yield level by level, first in first out, after promoting those that starve."""
        if self._steps_to_promotion <= 0:
            self._steps_to_promotion = self._steps_between_promotions
            self._promote_starving(now)
        return chain.from_iterable([level.values() for level in self._levels])

    def estimated_next_schedule_time(self, request: Request, now: float) -> float:
        """Return min(time to promotion, time until all above have fallen to this level).

        Paper §4.3: (1/B) Σ over requests at higher levels of the quanta they burn on the way down.
        """
        account = self._accounts[request.handle]
        if account.level == 0:
            return 0.0
        if self._fall_s is None:
            self._fall_s = self._fall_times()
        until_promotion_s = account.last_ran_at + self._starvation_limit - now
        return max(min(until_promotion_s, self._fall_s[account.level]), 0.0)

    def reserve_tokens(self, request: Request) -> int:
        """Blocks are taken on demand."""
        return 0

    def level(self, request: Request) -> int:
        """Return the level of a request."""
        return self._accounts[request.handle].level

    def stats(self) -> PolicyStats:
        """Return counters and the length of each queue."""
        sizes = {level: len(queue) for level, queue in enumerate(self._levels) if queue}
        return PolicyStats(self._num_demotions, self._num_promotions, sizes)

    def _fall_times(self) -> list[float]:
        """Return, per level i, (1/B) Σ over levels k < i of their requests' qₖ + … + qᵢ₋₁."""
        times: list[float] = []
        num_above, burnt_s, total_s = 0, 0.0, 0.0
        for quantum, queue in zip(self._quanta, self._levels, strict=True):
            times.append((num_above * total_s - burnt_s) / self._max_num_seqs)
            burnt_s += len(queue) * total_s
            num_above += len(queue)
            total_s += quantum
        return times

    def _demote(self, request: Request, account: _Account, next_s: float, now: float) -> None:
        """Move to the tail of the next level down that can hold an iteration."""
        self._fall_s = None
        del self._levels[account.level][request.handle]
        if account.level == 0:
            self._watch(request.handle, now)
        account.level += 1
        if self._skip_demotion:
            account.level = max(account.level, self._level_holding(next_s))
        account.used_s = 0.0
        self._reach(account.level)
        self._levels[account.level][request.handle] = request
        self._num_demotions += 1

    def _promote_starving(self, now: float) -> None:
        """Move whoever has not run for the starvation limit to the tail of level 0."""
        running: list[int] = []
        for _ in range(MAX_CHECKS_PER_PLAN):
            if not self._deadlines or self._deadlines[0][0] > now:
                break
            due, handle = heapq.heappop(self._deadlines)
            account = self._accounts.get(handle)
            if account is None or account.level == 0:
                continue
            deadline = account.last_ran_at + self._starvation_limit
            if deadline > due:  # it ran since; even if it is late again, others are later
                heapq.heappush(self._deadlines, (deadline, handle))
                continue
            request = self._levels[account.level][handle]
            if request.steps_in_flight:
                running.append(handle)
                continue
            del self._levels[account.level][handle]
            self._fall_s = None
            account.level, account.used_s = 0, 0.0
            self._levels[0][handle] = request
            self._num_promotions += 1
        for handle in running:
            self._watch(handle, now)

    def _watch(self, handle: int, now: float) -> None:
        heapq.heappush(self._deadlines, (now + self._starvation_limit, handle))
        if len(self._deadlines) > 64 + 2 * len(self._accounts):
            self._deadlines = sorted(
                (account.last_ran_at + self._starvation_limit, handle)
                for handle, account in self._accounts.items()
                if account.level
            )

    def _level_holding(self, seconds: float) -> int:
        """Return min{i : qᵢ ≥ seconds}."""
        level = 0
        while self._quanta[level] < seconds:
            level += 1
            self._reach(level)
        return level

    def _reach(self, level: int) -> None:
        """Make sure that the level exists."""
        while len(self._quanta) <= level:
            self._quanta.append(self._quanta[-1] * self._quantum_ratio)
            self._levels.append({})

    def _prefill_s(self, request: Request) -> float:
        """Return the seconds of the whole prefill that no cache spares, chunk by chunk."""
        start = request.num_cached_tokens
        return self._cost_model.prefill_s(request.num_tokens - start, start, self._max_chunk)

    def _next_iteration_s(self, request: Request) -> float:
        """Return the seconds of the next step of a request: a decode or a prefill chunk."""
        start = request.num_computed_tokens
        num_tokens = request.num_tokens - start
        if num_tokens == 1:
            return self._cost_model.decode_s(start)
        num_tokens = min(num_tokens, self._max_chunk)
        return self._cost_model.iteration_s(num_tokens, start)
