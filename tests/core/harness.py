"""Runs the real engine over the fake device and keeps account of what it owes every request."""

from __future__ import annotations

import random
from dataclasses import dataclass

from fastserve.config import SchedulerConfig
from fastserve.core.build import build_scheduler
from fastserve.core.cost_model import CostModel
from fastserve.core.journal import Journal
from fastserve.core.output import RequestUpdate
from fastserve.core.request import FinishReason, SamplingParams
from fastserve.engine.engine import Engine
from tests.fake_executor import FakeExecutor, VirtualClock, default_token, random_durations

UNIT_COST = CostModel(base_s=0.5, prefill_token_s=0.01, decode_seq_s=0.02, decode_context_s=0.0001)


@dataclass
class Expected:
    """What a request must yield."""

    seed: int
    max_tokens: int
    received: list[int]
    finish_reason: FinishReason | None = None


class Harness:
    """An engine in virtual time whose every step is followed by `check()`."""

    def __init__(
        self,
        config: SchedulerConfig,
        num_device_blocks: int,
        *,
        seed: int = 0,
        lengths: dict[int, int] | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.journal = Journal()
        self.clock = VirtualClock()
        self.executor = FakeExecutor(
            self.clock,
            config.block_size,
            num_slots=config.num_slots,
            lookahead=config.lookahead,
            step_s=random_durations(self.rng),
        )
        self.scheduler = build_scheduler(
            config, UNIT_COST, num_device_blocks, lengths=lengths, journal=self.journal
        )
        self.engine = Engine(self.scheduler, self.executor, self.clock)
        self.expected: dict[int, Expected] = {}

    def add(self, prompt: list[int], max_tokens: int, **kw: int) -> int:
        """Add a request whose seed, hence output, is its own."""
        seed = self.rng.randrange(2**31)
        params = SamplingParams(max_tokens=max_tokens, seed=seed)
        handle = self.engine.add(prompt, params, **kw)
        self.expected[handle] = Expected(seed, max_tokens, [])
        return handle

    def take(self, update: RequestUpdate | None) -> None:
        """Hold an update against what the request is owed."""
        assert update is not None
        expected = self.expected[update.request]
        assert expected.finish_reason is None, "news after the terminal event"
        for sample in update.samples:
            position = len(expected.received)
            assert sample.token_id == default_token(expected.seed, position)
            expected.received.append(sample.token_id)
        if update.finish_reason is not None:
            expected.finish_reason = update.finish_reason
            assert update.metrics is not None
            if update.finish_reason is FinishReason.LENGTH:
                assert len(expected.received) == expected.max_tokens

    def step(self, until: float = float("inf")) -> None:
        """Turn the crank once."""
        for update in self.engine.step(until):
            self.take(update)
        self.scheduler.check()

    def drain(self, max_steps: int = 100_000) -> None:
        """Run until every request has ended and every step has landed."""
        for _ in range(max_steps):
            if not self.executor.running and not self.scheduler.num_requests:
                break
            self.step()
        self.check_at_rest()

    def check_at_rest(self) -> None:
        """Assert that nothing is owed and nothing is held."""
        self.scheduler.check()
        assert self.scheduler.num_requests == 0
        assert all(expected.finish_reason is not None for expected in self.expected.values())
        stats = self.scheduler.stats(self.clock.now())
        assert stats.device_blocks_used == 0
        assert stats.device_blocks_free + stats.device_blocks_cached == stats.device_blocks_total
