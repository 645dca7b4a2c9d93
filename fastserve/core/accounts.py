"""Accounts: what happened to requests, counted for their ends and for the engine's statistics.

Rules: nothing here decides. Counters only grow. A request waits from its arrival, and from the end
of its last step, until a plan has it or it ends: `queue_s` is the sum. It is preempted when it ran
in the plan before, could be in the next one, and is not. Must not know: samples, blocks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from fastserve.core.memory.pool import BlockPool
from fastserve.core.memory.swap import Moves
from fastserve.core.messages import WORK_BOUNDS_S, RequestMetrics, SchedulerStats
from fastserve.core.policies.protocol import LevelStats, Policy, Predictions
from fastserve.core.request import Handle, Request


@dataclass(slots=True)
class Counters:
    """Sums over all requests."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_computed_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_dropped_samples: int = 0
    num_stalls: int = 0
    copy_wait_s: float = 0.0


class Accounts:
    """The counters, and which requests run."""

    def __init__(self) -> None:
        self.counters = Counters()
        # Those of the latest plan, and those that could not be in it: in flight, at their limit.
        self._running: dict[Handle, Request] = {}
        self._num_started = 0  # live requests that some plan has had
        self._waits_since: float | None = None  # when nothing could run but for a copy

    def planned(self, chosen: Iterable[tuple[Request, int]], now: float) -> None:
        """Note a plan of these shares; `steps_in_flight` includes the step."""
        self.counters.num_steps += 1
        if self._waits_since is not None:
            self.counters.copy_wait_s += now - self._waits_since
            self._waits_since = None
        planned: dict[Handle, Request] = {}
        for request, _ in chosen:
            planned[request.handle] = request
            if request.steps_in_flight == 1:
                request.queue_s += now - request.last_ran_at
                if request.first_scheduled_at is None:
                    request.first_scheduled_at = now
                    self._num_started += 1
        for handle, request in self._running.items():
            if handle not in planned:
                if request.steps_in_flight or request.is_at_length_limit:
                    planned[handle] = request
                else:
                    request.num_preemptions += 1
                    self.counters.num_preemptions += 1
        self._running = planned

    def waits_for_copies(self, now: float) -> None:
        """Note that nothing can run before a copy is done."""
        if self._waits_since is None:
            self._waits_since = now

    def computed(self, request: Request, before: int, end: int) -> bool:
        """Note that positions [before, end) have KV; return whether any never had it before."""
        if end > before == request.max_computed_tokens >= request.num_prompt_tokens:
            request.max_computed_tokens = end  # the common case: a decode that repeats nothing
            return True
        counters = self.counters
        if before < request.num_prompt_tokens:
            counters.num_computed_prompt_tokens += min(end, request.num_prompt_tokens) - before
        if end <= request.max_computed_tokens:
            repeated = end - before
        else:
            repeated = max(request.max_computed_tokens - before, 0)
            request.max_computed_tokens = end
        if repeated:
            request.num_recomputed_tokens += repeated
            counters.num_recomputed_tokens += repeated
        return repeated < end - before

    def closed(
        self, request: Request, level: int, predicted_tokens: float | None, now: float
    ) -> RequestMetrics:
        """Return what happened to a request that ends, beside what the policy knew of it."""
        self._running.pop(request.handle, None)
        if request.first_scheduled_at is not None:
            self._num_started -= 1
        if not request.steps_in_flight:
            request.queue_s += now - request.last_ran_at
        return RequestMetrics(
            arrival=request.arrived_at,
            first_scheduled=request.first_scheduled_at,
            first_token=request.first_token_at,
            finished=now,
            queue_s=request.queue_s,
            num_preemptions=request.num_preemptions,
            num_swaps=request.num_swaps,
            swap_s=request.swap_s,
            recomputed_tokens=request.num_recomputed_tokens,
            cached_tokens=request.num_cached_tokens,
            level=level,
            predicted_output_tokens=predicted_tokens,
        )

    def snapshot(
        self, num_requests: int, policy: Policy, pool: BlockPool, moves: Moves
    ) -> SchedulerStats:
        """Return the counters beside what is so now, of so many live requests."""
        levels, counters = _level_stats(policy, num_requests), self.counters
        device, host = pool.device, pool.host
        predictions, num_started = policy.predictions, self._num_started
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=num_requests - num_started,
            num_preempted=num_started - len(self._running),
            requests_by_level=levels.requests_by_level,
            device_blocks_total=device.num_blocks,
            device_blocks_free=device.num_free,
            device_blocks_cached=device.num_cached,
            device_blocks_moving=device.num_moving,
            device_blocks_used=device.num_used,
            host_blocks_total=host.num_blocks,
            host_blocks_free=host.num_free,
            host_blocks_cached=host.num_cached,
            host_blocks_moving=host.num_moving,
            host_blocks_used=host.num_used,
            num_steps=counters.num_steps,
            num_preemptions=counters.num_preemptions,
            num_demotions=levels.num_demotions,
            num_promotions=levels.num_promotions,
            num_recomputed_tokens=counters.num_recomputed_tokens,
            num_computed_prompt_tokens=counters.num_computed_prompt_tokens,
            num_cached_prompt_tokens=counters.num_cached_prompt_tokens,
            num_dropped_samples=counters.num_dropped_samples,
            num_stalls=counters.num_stalls,
            num_swaps=moves.num_swaps,
            num_swapped_out_blocks=moves.num_swapped_out_blocks,
            num_swapped_in_blocks=moves.num_swapped_in_blocks,
            num_saved_blocks=moves.num_saved_blocks,
            num_fetched_blocks=moves.num_fetched_blocks,
            num_clean_blocks=moves.num_clean_blocks,
            num_failed_copies=moves.num_failed_copies,
            copy_wait_s=counters.copy_wait_s,
            forecasts=None if predictions is None else predictions.forecasts(),
            requests_by_work=_count_by_work(predictions),
        )


def level_of(policy: Policy, request: Request) -> int:
    """Return the level of a live request; 0 where the policy has none."""
    return 0 if policy.levels is None else policy.levels.level(request)


def predicted_tokens_of(policy: Policy, request: Request) -> float | None:
    """Return the length that was expected of a live request's answer; None: not predicted."""
    predictions = policy.predictions
    return None if predictions is None else predictions.predicted_output_tokens(request)


def _count_by_work(predictions: Predictions | None) -> tuple[int, ...]:
    if predictions is None:
        return ()
    counts = [0] * (len(WORK_BOUNDS_S) + 1)
    for work_s, num_requests in predictions.expected_work():
        counts[bisect_right(WORK_BOUNDS_S, work_s)] += num_requests
    return tuple(counts)


def _level_stats(policy: Policy, num_requests: int) -> LevelStats:
    if policy.levels is not None:
        return policy.levels.stats()
    return LevelStats(0, 0, {0: num_requests} if num_requests else {})
