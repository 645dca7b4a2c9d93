"""The paper's scheduler (§4.2): a multi-level feedback queue, with or without skip-join.

Output lengths are unknown, prompt lengths are known. Level i has the quantum q₁ · ratioⁱ. With
skip-join a request joins the highest level whose quantum covers its whole prefill; it is billed
the device seconds of every step it takes part in; when its quantum cannot hold another iteration
it is demoted, past levels that could not hold one either; when it has not run for
`starvation_limit` seconds it is promoted to level 0. Within a level: first in, first out.
Preemption falls out: not to be among the first of the order is not to be in the next plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from fastserve.core.cost_model import CostModel
from fastserve.core.policies.parts import Deadlines, uncached_prefill_s
from fastserve.core.policies.protocol import Coldness, LevelStats
from fastserve.core.policies.quanta import Quanta, skip_levels
from fastserve.core.policies.reservation import ON_DEMAND
from fastserve.core.request import FinishReason, Request

MAX_CHECKS_PER_PLAN = 256  # of deadlines: no step could run more of those that starve at once


@dataclass(slots=True)
class _Account:
    """Where a request stands, and its attained service when the quantum of this level began."""

    level: int
    begun_at_s: float


class MLFQ:
    """Levels of FIFO queues; level 0 runs first."""

    reservation = ON_DEMAND
    predictions = None

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
        level_below: Callable[[Quanta, int, float], int] = skip_levels,
    ) -> None:
        """Take q₁ and α in seconds; `max_chunk` is the longest prefill share of one step.

        `level_below` says to which level a request falls whose next iteration takes so long.
        """
        self._cost_model = cost_model
        self._quanta = Quanta(quantum_s, quantum_ratio)
        self._starvation_limit = starvation_limit
        self._max_num_seqs = max_num_seqs
        self._max_chunk = max_chunk
        self._skip_join = skip_join
        self._level_below = level_below
        self._queues: list[dict[int, Request]] = [{}]
        self._accounts: dict[int, _Account] = {}
        # Of requests below level 0. One that has run since is found when it comes due.
        self._deadlines = Deadlines()
        self._fall_s: list[float] | None = None  # valid until a queue changes
        self._num_demotions = 0
        self._num_promotions = 0

    @property
    def levels(self) -> MLFQ:
        """The queues."""
        return self

    def admit(self, request: Request, now: float) -> None:
        """Join the level that the prefill time calls for (skip-join), or the highest."""
        level = 0
        if self._skip_join:
            prefill_s = uncached_prefill_s(request, self._cost_model, self._max_chunk)
            level = self._quanta.holding(prefill_s)
        self._accounts[request.handle] = _Account(level, request.attained_s)
        self._join(request, level)
        if level:
            self._deadlines.put(request.handle, now + self._starvation_limit)

    def ran(self, requests: Sequence[Request], now: float) -> None:
        """Demote those whose quantum cannot hold another iteration."""
        accounts, quanta = self._accounts, self._quanta.seconds
        for request in requests:
            account = accounts[request.handle]
            next_s = self._next_iteration_s(request)
            if request.attained_s - account.begun_at_s + next_s > quanta[account.level]:
                self._demote(request, account, next_s)

    def finished(self, request: Request, reason: FinishReason) -> None:
        """Leave the queues."""
        self._leave(request, self._accounts.pop(request.handle).level)
        self._deadlines.discard(request.handle)

    def move(self, request: Request, to: MLFQ) -> None:
        """Leave for the tail of the same level, with what is used of its quantum."""
        account = self._accounts.pop(request.handle)
        self._leave(request, account.level)
        to._accounts[request.handle] = account
        to._join(request, account.level)
        due = self._deadlines.discard(request.handle)
        if due is not None:
            to._deadlines.put(request.handle, due)

    def advance(self, now: float) -> None:
        """Promote those that have not run for the starvation limit to the tail of level 0."""
        limit, deadlines, top = self._starvation_limit, self._deadlines, self._queues[0]
        in_flight: list[int] = []
        for _ in range(MAX_CHECKS_PER_PLAN):
            entry = deadlines.pop(now)
            if entry is None:
                break
            due, handle = entry
            account = self._accounts[handle]
            queue = self._queues[account.level]
            request = queue[handle]
            deadline = request.last_ran_at + limit
            if deadline > due:  # even if it is late again, others are later
                deadlines.put(handle, deadline)
            elif request.steps_in_flight:
                in_flight.append(handle)
            else:
                del queue[handle]
                top[handle] = request
                account.level, account.begun_at_s = 0, request.attained_s
                self._fall_s = None
                self._num_promotions += 1
        for handle in in_flight:
            deadlines.put(handle, now + limit)

    def next_event(self, now: float) -> float:
        """Return the earliest time at which a request might starve."""
        return self._deadlines.first()[0]

    def ordered(self) -> Iterator[Request]:
        """Yield level by level, first in first out."""
        return chain.from_iterable([queue.values() for queue in self._queues])

    def coldness(self, request: Request, now: float) -> Coldness:
        """Return the estimated next schedule time."""
        return (self.estimated_next_schedule_time(request, now),)

    def estimated_next_schedule_time(self, request: Request, now: float) -> float:
        """Return min(time to promotion, time until all above have fallen to this level).

        Paper §4.3: (1/B) Σ over requests at higher levels of the quanta they burn on the way down.
        """
        account = self._accounts[request.handle]
        if account.level == 0:
            return 0.0
        if self._fall_s is None:
            self._fall_s = self._fall_times()
        until_promotion_s = request.last_ran_at + self._starvation_limit - now
        return max(min(until_promotion_s, self._fall_s[account.level]), 0.0)

    def level(self, request: Request) -> int:
        """Return the level of a request."""
        return self._accounts[request.handle].level

    def stats(self) -> LevelStats:
        """Return counters and the length of each queue."""
        sizes = {level: len(queue) for level, queue in enumerate(self._queues) if queue}
        return LevelStats(self._num_demotions, self._num_promotions, sizes)

    def _fall_times(self) -> list[float]:
        """Return, per level i, (1/B) Σ over levels k < i of their requests' qₖ + … + qᵢ₋₁."""
        times: list[float] = []
        num_above, burnt_s, total_s = 0, 0.0, 0.0
        for quantum, queue in zip(self._quanta.seconds, self._queues, strict=False):
            times.append((num_above * total_s - burnt_s) / self._max_num_seqs)
            burnt_s += len(queue) * total_s
            num_above += len(queue)
            total_s += quantum
        return times

    def _demote(self, request: Request, account: _Account, next_s: float) -> None:
        """Move to the tail of a level below."""
        self._leave(request, account.level)
        if account.level == 0:
            self._deadlines.put(request.handle, request.last_ran_at + self._starvation_limit)
        account.level = self._level_below(self._quanta, account.level, next_s)
        account.begun_at_s = request.attained_s
        self._join(request, account.level)
        self._num_demotions += 1

    def _leave(self, request: Request, level: int) -> None:
        self._fall_s = None
        del self._queues[level][request.handle]

    def _join(self, request: Request, level: int) -> None:
        """Join the tail of a level."""
        self._fall_s = None
        while len(self._queues) <= level:
            self._quanta.reach(level)
            self._queues.append({})
        self._queues[level][request.handle] = request

    def _next_iteration_s(self, request: Request) -> float:
        """Return the seconds of the next step of a request: a decode or a prefill chunk."""
        start = request.num_computed_tokens
        num_tokens = request.num_tokens - start
        if num_tokens == 1:
            return self._cost_model.decode_s(start)
        num_tokens = min(num_tokens, self._max_chunk)
        return self._cost_model.iteration_s(num_tokens, start)
