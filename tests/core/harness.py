"""Runs the real engine over the fake device and keeps account of what it owes every request."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastserve.core.build import build_scheduler
from fastserve.core.cost_model import CostModel
from fastserve.core.journal import Journal
from fastserve.core.lengths import LengthModel
from fastserve.core.messages import Copy, RequestUpdate, SchedulerOutput, TokenLogprobs
from fastserve.core.policies.protocol import Policy
from fastserve.core.request import Arrival, FinishReason, Handle, Request, SamplingParams
from fastserve.core.scheduler import Scheduler
from fastserve.engine.engine import Engine
from fastserve.settings.scheduler import SchedulerConfig, pool_window
from fastserve.sim.clock import VirtualClock
from tests.fake_executor import (
    FakeExecutor,
    default_token,
    prompt_score,
    random_durations,
    undisturbed,
)

UNIT_COST = CostModel(base_s=0.5, prefill_token_s=0.01, decode_seq_s=0.02, decode_context_s=0.0001)


def small_config(**changes: Any) -> SchedulerConfig:
    """Return settings in which a test can count on its fingers."""
    settings: dict[str, Any] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        "block_size": 4,
        "enable_prefix_caching": False,
        "scheduling_policy": "fcfs",
        "starvation_limit": 1e9,
        "is_strict": True,
    }
    return SchedulerConfig(**(settings | changes))


@dataclass
class Expected:
    """What a request must yield, alone on the machine, and what came of it."""

    seed: int
    max_tokens: int
    owed: list[int]
    reason: FinishReason
    stop_reason: int | None
    scores: list[TokenLogprobs]
    received: list[int] = field(default_factory=list)
    received_scores: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    last: RequestUpdate | None = None


class Harness:
    """An engine in virtual time whose every step is followed by `check()`."""

    def __init__(
        self,
        config: SchedulerConfig,
        num_device_blocks: int,
        num_host_blocks: int = 0,
        *,
        seed: int = 0,
        policy: Policy | None = None,
        lengths: dict[int, int] | None = None,
        length_model: LengthModel | None = None,
        token: Callable[[int, int], int] = default_token,
        step_s: Callable[[SchedulerOutput], float] | None = None,
        copy_s: Callable[[Copy], float] | None = None,
        copy_fails: Callable[[Copy], bool] = lambda copy: False,
        costs: CostModel = UNIT_COST,
        sink: Callable[[str], object] | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        window = pool_window(config.max_model_len, num_device_blocks, config.block_size)
        self.config = config = replace(config, max_model_len=window)
        self.journal = Journal(sink)
        self.clock = VirtualClock()
        self.executor = FakeExecutor(
            self.clock,
            config.block_size,
            num_slots=config.num_slots,
            lookahead=config.lookahead,
            step_s=step_s or random_durations(self.rng),
            copy_s=copy_s or (lambda copy: costs.copy_s(len(copy.src))),
            copy_fails=copy_fails,
            is_checked=config.preemption_mode != "ideal",  # whose copies no plan carries
            token=token,
        )
        self.scheduler = build_scheduler(
            config,
            costs,
            num_device_blocks,
            num_host_blocks,
            policy=policy,
            lengths=lengths,
            length_model=length_model,
        )
        self.engine = Engine(self.scheduler, self.executor, self.clock, [self.journal])
        self.expected: dict[int, Expected] = {}
        self.num_errors = 0  # ends of requests whose step failed

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "",
        **kw: Any,
    ) -> int:
        """Add a request whose seed, hence output, is its own; `kw` are sampling parameters."""
        seed = kw.pop("seed", None)
        seed = self.rng.randrange(2**31) if seed is None else seed
        params = SamplingParams(max_tokens=max_tokens, seed=seed, **kw)
        arrival = Arrival(prompt, params, priority=priority, cache_salt=cache_salt, tenant=tenant)
        handle = self.engine.add(arrival)
        owed, reason, stop_reason = undisturbed(
            params, self.executor.token, self.config.eos_token_ids
        )
        scores = [prompt_score(token_id, p) for p, token_id in enumerate(prompt) if p]
        if params.prompt_logprobs is None:
            scores = []
        self.expected[handle] = Expected(seed, max_tokens, owed, reason, stop_reason, scores)
        return handle

    def take(self, update: RequestUpdate | None, *, is_early: bool = False) -> None:
        """Hold an update against what the request is owed."""
        assert update is not None
        expected = self.expected[update.handle]
        assert expected.finish_reason is None, "news after the terminal event"
        assert update.samples or update.finish_reason or update.prompt_logprobs, "no news"
        expected.received.extend(sample.token_id for sample in update.samples)
        assert expected.received == expected.owed[: len(expected.received)]
        expected.received_scores.extend(update.prompt_logprobs)
        assert expected.received_scores == expected.scores[: len(expected.received_scores)]
        if update.finish_reason is None:
            assert update.metrics is None
            return
        expected.finish_reason, expected.last = update.finish_reason, update
        assert update.metrics is not None
        self._check_metrics(update)
        if update.finish_reason is FinishReason.ERROR:
            assert update.error
            self.num_errors += 1
        elif not is_early:
            assert expected.received == expected.owed
            assert expected.received_scores == expected.scores
            assert update.finish_reason is expected.reason
            assert update.stop_reason == expected.stop_reason

    def _check_metrics(self, update: RequestUpdate) -> None:
        metrics = update.metrics
        assert metrics is not None
        assert metrics.finished == self.clock.now()
        assert -1e-9 <= metrics.queue_s <= metrics.finished - metrics.arrival + 1e-9
        moments = (metrics.arrival, metrics.first_scheduled, metrics.first_token, metrics.finished)
        known = [moment for moment in moments if moment is not None]
        assert known == sorted(known)

    def abort(self, handle: int) -> None:
        """Abort a live request."""
        self.take(self.engine.abort(Handle(handle)), is_early=True)
        assert self.expected[handle].finish_reason is FinishReason.ABORT
        assert self.engine.abort(Handle(handle)) is None

    def finish(self, handle: int) -> None:
        """End a live request as a stop string at its last received id would."""
        num_received = len(self.expected[handle].received)
        self.take(self.engine.finish(Handle(handle), num_received), is_early=True)
        assert self.expected[handle].finish_reason is FinishReason.STOP
        assert self.engine.finish(Handle(handle), num_received) is None

    def fail_next_step(self) -> None:
        """Let the next step that is submitted fail."""
        self.executor.fails_next = True

    @property
    def live(self) -> list[int]:
        """Handles of the requests that have not ended."""
        return [h for h, expected in self.expected.items() if expected.finish_reason is None]

    @property
    def is_busy(self) -> bool:
        """Whether a step would not wait for ever."""
        return not self.engine.is_idle

    def request(self, handle: int) -> Request:
        """Return a live request."""
        return self.scheduler._requests[Handle(handle)]

    def step(self, until: float = float("inf")) -> None:
        """Turn the crank once."""
        for update in self.engine.step(until):
            self.take(update)
        self.scheduler.check()
        self.check_seats()
        spoil_free_places(self.scheduler, self.executor)

    def check_seats(self) -> None:
        """Assert that no more requests hold KV than may."""
        max_live = self.config.max_live_seqs
        assert max_live is None or self.scheduler.cache.num_tables <= max_live

    def drain(self, max_steps: int = 100_000) -> None:
        """Run until every request has ended and every step has landed."""
        for _ in range(max_steps):
            if not self.is_busy:
                break
            self.step()
        self.check_at_rest()

    def check_at_rest(self) -> None:
        """Assert that nothing is owed and nothing is held."""
        check_at_rest(self.scheduler)
        assert all(expected.finish_reason is not None for expected in self.expected.values())
        stats = self.scheduler.stats()
        assert stats.num_swaps >= sum(
            expected.last.metrics.num_swaps
            for expected in self.expected.values()
            if expected.last is not None and expected.last.metrics is not None
        )
        assert not self.executor.states


def spoil_free_places(scheduler: Scheduler, executor: FakeExecutor) -> None:
    """Empty what the scheduler holds free on both tiers, so that one who reads it is seen."""
    pool = scheduler.cache.pool
    for kv, tier in ((executor.device_kv, pool.device), (executor.host_kv, pool.host)):
        for place in tier._given_back:
            kv.pop(place, None)


def check_at_rest(scheduler: Scheduler) -> None:
    """Assert that no request is there, and all places are free or hold what anybody may find."""
    scheduler.check()
    assert scheduler.num_requests == 0
    stats = scheduler.stats()
    assert stats.device_blocks_used == 0
    assert stats.device_blocks_moving == 0
    assert stats.device_blocks_free + stats.device_blocks_cached == stats.device_blocks_total
    assert (stats.host_blocks_used, stats.host_blocks_moving) == (0, 0)
    assert stats.host_blocks_free + stats.host_blocks_cached == stats.host_blocks_total
    assert (stats.num_running, stats.num_waiting, stats.num_preempted) == (0, 0, 0)
    assert not stats.requests_by_level
    assert stats.num_stalls == 0
    check_forgotten(scheduler)


def check_forgotten(scheduler: Scheduler) -> None:
    """Assert that nothing per request outlives the requests."""
    assert not scheduler._requests
    assert not scheduler._accounts._running
    assert scheduler._accounts._num_started == 0
    assert not scheduler._in_flight
    assert not scheduler._forget
    tables = scheduler.cache._tables
    assert tables.is_empty
    assert not tables.away
    assert not tables._draining
    assert scheduler.cache.num_copies == 0
    assert scheduler.cache.num_leaving == 0
    assert scheduler.cache.num_tables == 0
