"""The ranks of one model in virtual time: a checked device, heard through what its ranks say.

A `FakeExecutor` holds the KV and checks every plan against it. When a step or a copy of it ends,
the engine learns it as from live ranks: each says so at a time of its own, a `Tally` waits for
those that it takes, an `InFlight` puts steps in order. Both are the product's.
Rules: nothing is told before the last rank has said it. Must not know: requests beyond their
handles, why something goes wrong.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from heapq import heappop, heappush
from math import inf

from fastserve.core.messages import (
    NO_TOKEN,
    Copy,
    ExecutorOutput,
    Sample,
    SchedulerOutput,
    StepDone,
)
from fastserve.core.request import Handle
from fastserve.executor.in_flight import InFlight
from fastserve.executor.tally import Tally
from fastserve.sim.clock import VirtualClock
from tests.dst.scenario import EOS, POISON, STEP_S, STOP_ID, FaultKind, Scenario
from tests.fake_executor import FakeExecutor, Running


class PoisonError(RuntimeError):
    """A request ended the process that was to compute it."""


def token(seed: int, position: int) -> int:
    """Return the id at an output position of a request; some end its answer."""
    drawn = (seed * 1_000_003 + position * 7919 + position * position * 31) % 50_021
    if drawn % 23 == 0:
        return EOS
    return STOP_ID if drawn % 19 == 0 else 100 + drawn


class Device:
    """Fits `Executor`; `on_failed` is told whose step failed. `seen` counts what went wrong."""

    def __init__(
        self,
        scenario: Scenario,
        clock: VirtualClock,
        rng: random.Random,
        on_failed: Callable[[Collection[Handle]], None],
    ) -> None:
        config = scenario.config
        self.seen: Counter[FaultKind] = Counter()
        self.is_dead = False
        self._clock = clock
        self._rng = rng
        self._layout = scenario.layout
        self._on_failed = on_failed
        self._spoils_next = False
        self._in_flight = InFlight(config.num_slots, config.lookahead)
        self._tally = Tally(scenario.layout, self._in_flight)
        self._words: list[tuple[float, int, Callable[[], None]]] = []  # of ranks, by their time
        self._num_words = 0
        self.fake = FakeExecutor(
            clock,
            config.block_size,
            num_slots=config.num_slots,
            lookahead=config.lookahead,
            step_s=lambda plan: rng.uniform(*STEP_S),
            copy_s=lambda copy: rng.uniform(0.0, scenario.longest_copy_s),
            copy_fails=lambda copy: rng.random() < scenario.share_failing_copies,
            token=token,
            is_checked=config.preemption_mode != "ideal",  # whose copies no plan carries
        )

    # ── what the engine asks ─────────────────────────────────────────────────────────────────

    def can_submit(self) -> bool:
        """Whether a slot is free for a plan with work."""
        can_begin = self._in_flight.can_begin()
        assert can_begin == self.fake.can_submit()
        return can_begin

    def submit(self, plan: SchedulerOutput) -> None:
        """Let the device carry a plan out, and settle when each rank will say so."""
        if any(POISON in work.token_ids for work in plan.work):
            self.is_dead = True
            self.seen[FaultKind.POISONED] += 1
            raise PoisonError("the device died of what it was to compute")
        self._in_flight.begin(plan)
        num_copying = len(self.fake.copying)
        self.fake.submit(plan)
        for copying in self.fake.copying[num_copying:]:
            self._expect_copy(copying.copy, copying.finishes_at, copying.has_failed)
        if plan.work:
            run = self.fake.running[-1]
            self._fail_some(run)
            done = StepDone(plan.step_id, run.samples, run.device_s, run.scores, run.error)
            self._expect_step(done, run.finishes_at)

    def wait(self, until: float) -> ExecutorOutput | None:
        """Return what all ranks have said by now: time passes elsewhere."""
        ended = self.fake.wait(self._clock.time)
        while self._words and self._words[0][0] <= self._clock.time:
            heappop(self._words)[2]()
        said = self._in_flight.wait(-inf)
        if ended is None:
            assert said is None, "told before the last rank was through"
            return None
        assert said is not None
        assert [step.step_id for step in said.steps] == [step.step_id for step in ended.steps]
        assert sorted(said.copies) == sorted(ended.copies)
        assert sorted(said.failed_copies) == sorted(ended.failed_copies)
        self.seen[FaultKind.COPY_FAILED] += len(said.failed_copies)
        return said

    def wake(self) -> None:
        """Nobody waits: virtual time does not pass by itself."""

    def close(self) -> None:
        """There is nothing to free."""

    # ── what goes on in it ───────────────────────────────────────────────────────────────────

    @property
    def next_end(self) -> float:
        """When the next step or copy is done; inf where none is under way."""
        return -inf if self._in_flight.has_failed else self.fake.next_end

    def fail_next_step(self) -> None:
        """Let the next step that is submitted fail."""
        self.fake.fails_next = True

    def spoil_next_sample(self) -> None:
        """Let no id be drawn for some request of the next step that has any."""
        self._spoils_next = True

    def lose_rank(self) -> None:
        """Let a rank leave: nothing more can be carried out."""
        self.is_dead = True
        rank = self._rng.randrange(self._layout.num_ranks)
        self._in_flight.fail(f"rank {rank} is gone")

    def _fail_some(self, run: Running) -> None:
        """Note a step that failed; spoil a sample of one that did not, if one is to be."""
        works = run.plan.work
        if run.error is not None:
            self.seen[FaultKind.STEP_FAILED] += 1
            self._on_failed([work.handle for work in works])
        elif self._spoils_next and run.samples:
            self._spoils_next = False
            self.seen[FaultKind.NO_NUMBERS] += 1
            sampled = [work.handle for work in works if work.sample]
            spoilt = self._rng.randrange(len(sampled))
            run.samples[spoilt] = Sample(NO_TOKEN)
            self._on_failed([sampled[spoilt]])

    def _expect_copy(self, copy: Copy, finishes_at: float, has_failed: bool) -> None:
        ranks = list(range(self._layout.num_ranks))
        failing = self._rng.sample(ranks, self._rng.randint(1, len(ranks))) if has_failed else ()
        last = self._rng.choice(ranks)
        for rank in ranks:
            at = finishes_at if rank == last else self._before(finishes_at)
            self._say(at, partial(self._tally.copy_ended, copy.copy_id, rank not in failing))

    def _expect_step(self, done: StepDone, finishes_at: float) -> None:
        layout = self._layout
        last_stage = layout.pipeline_parallel_size - 1
        for stage in range(last_stage):
            through = StepDone(done.step_id, (), done.device_s)
            word = partial(self._tally.step_ended, layout.rank_at(stage, 0), through)
            self._say(self._before(finishes_at), word)
        self._say(finishes_at, partial(self._tally.step_ended, layout.rank_at(last_stage, 0), done))

    def _before(self, finishes_at: float) -> float:
        now = self._clock.time
        return min(now + self._rng.random() * (finishes_at - now), finishes_at)

    def _say(self, at: float, word: Callable[[], None]) -> None:
        heappush(self._words, (at, self._num_words, word))
        self._num_words += 1
