"""Any sequence of events over the scheduler: hypothesis looks for the one that breaks a promise.

What hypothesis draws is not the same twice, so nothing here asks that a thing happened: that swaps
and failures of copies do is asserted where the seeds are fixed (test_random_runs).
"""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from fastserve.core.request import FinishReason
from tests.core.harness import UNIT_COST, Harness, small_config
from tests.core.replayed import replayed

WINDOW = 24
EOS, ANOTHER_EOS, STOP = 0, 1, 2
LINKED = replace(UNIT_COST, prefill_token_s=0.2, copy_base_s=0.01, copy_block_s=0.01)
SHARED = list(range(100, 100 + WINDOW))


def few_ids(seed: int, position: int) -> int:
    """Return ids among which the end-of-sequence ones come up often."""
    return (seed * 7919 + position * position * 31 + position) % 12


class EventsInAnyOrder(RuleBasedStateMachine):
    """Requests come, run, are cut short and end; the harness holds every step to account."""

    def __init__(self) -> None:
        super().__init__()
        self.harness: Harness
        self.lengths: dict[int, int] = {}
        self.lines: list[str] = []
        self.num_blocks = self.num_host_blocks = 0
        self.has_failure = False
        self.copy_s = 1.0
        self.copies_fail = False

    @initialize(
        pipeline=st.sampled_from(((1, 0), (1, 1), (2, 0), (4, 0))),
        policy=st.sampled_from(("fcfs", "learned", "mlfq", "skip-join-mlfq", "srpt")),
        is_chunked=st.booleans(),
        has_prefix_cache=st.booleans(),
        block_size=st.sampled_from((1, 3, 4)),
        num_spare_blocks=st.sampled_from((0, 1, 4, 40)),
        max_num_seqs=st.sampled_from((1, 2, 5)),
        max_live_seqs=st.sampled_from((None, 1, 2)),
        alpha=st.sampled_from((0.0, 1.0, 4.0, 1e9)),
        num_host_blocks=st.sampled_from((0, 1, 10, 100)),
        mode=st.sampled_from(("recompute", "proactive", "proactive-by-level", "reactive")),
        write_through=st.booleans(),
    )
    def build(
        self,
        pipeline: tuple[int, int],
        policy: str,
        is_chunked: bool,
        has_prefix_cache: bool,
        block_size: int,
        num_spare_blocks: int,
        max_num_seqs: int,
        max_live_seqs: int | None,
        alpha: float,
        num_host_blocks: int,
        mode: str,
        write_through: bool,
    ) -> None:
        """Start with an empty machine of some shape."""
        slots, lookahead = pipeline
        config = small_config(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + 3 if is_chunked else WINDOW,
            max_model_len=WINDOW,
            block_size=block_size,
            max_live_seqs=max_live_seqs,
            enable_chunked_prefill=is_chunked,
            enable_prefix_caching=has_prefix_cache,
            scheduling_policy=policy,
            starvation_limit=alpha,
            max_pause=alpha,
            priority_aging=5.0,
            preemption_mode=mode,
            write_through=write_through,
            num_slots=slots,
            lookahead=lookahead,
            eos_token_ids=frozenset((EOS, ANOTHER_EOS)),
        )
        num_blocks = -(-WINDOW // block_size) + num_spare_blocks
        self.harness = Harness(
            config,
            num_blocks,
            num_host_blocks,
            lengths=self.lengths,
            token=few_ids,
            costs=LINKED,
            copy_s=lambda copy: self.copy_s,
            copy_fails=lambda copy: self.copies_fail,
            sink=self.lines.append,
        )
        self.num_blocks, self.num_host_blocks = num_blocks, num_host_blocks

    @rule(
        num_shared=st.integers(0, WINDOW - 1),
        num_own=st.integers(0, WINDOW - 1),
        wanted=st.integers(1, WINDOW),
        min_tokens=st.sampled_from((0, 0, 0, 3)),
        ignore_eos=st.booleans(),
        has_stop_id=st.booleans(),
        is_scored=st.booleans(),
        priority=st.sampled_from((0, 0, 0, -1, 3, 1000)),
        seed=st.integers(0, 11),
    )
    def add(
        self,
        num_shared: int,
        num_own: int,
        wanted: int,
        min_tokens: int,
        ignore_eos: bool,
        has_stop_id: bool,
        is_scored: bool,
        priority: int,
        seed: int,
    ) -> None:
        """A request comes, often with a beginning that others have too."""
        handle = len(self.harness.expected)
        own = [1000 * (handle + 1) + position for position in range(num_own)]
        prompt = (SHARED[:num_shared] + own)[: WINDOW - 1] or [7]
        max_tokens = min(wanted, WINDOW - len(prompt))
        self.lengths[handle] = max_tokens
        added = self.harness.add(
            prompt,
            max_tokens,
            priority=priority,
            seed=seed,
            min_tokens=min(min_tokens, max_tokens),
            ignore_eos=ignore_eos,
            stop_token_ids=(STOP,) if has_stop_id else (),
            prompt_logprobs=0 if is_scored else None,
        )
        assert added == handle
        self.lengths[handle] = len(self.harness.expected[handle].owed)
        self.harness.scheduler.check()

    @precondition(lambda self: self.harness.is_busy)
    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        """Steps land."""
        for _ in range(count):
            if self.harness.is_busy:
                self.harness.step()

    @precondition(lambda self: self.harness.is_busy)
    @rule()
    def submit_without_waiting(self) -> None:
        """The crank is turned while nothing lands: plans go out, then a wake-up."""
        self.harness.executor.wake()
        self.harness.step()

    @rule(seconds=st.sampled_from((0.1, 2.0, 30.0)))
    def let_time_pass(self, seconds: float) -> None:
        """Time passes, perhaps to the middle of a step."""
        self.harness.step(self.harness.clock.now() + seconds)

    @rule(copy_s=st.sampled_from((0.0, 0.3, 1.0, 20.0)), copies_fail=st.sampled_from((0, 0, 1)))
    def change_link(self, copy_s: float, copies_fail: int) -> None:
        """Copies that begin from now on are fast or slow, overtake others, or all fail."""
        self.copy_s, self.copies_fail = copy_s, bool(copies_fail)

    @precondition(lambda self: self.harness.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """A client goes away."""
        self.harness.abort(data.draw(st.sampled_from(self.harness.live)))
        self.harness.scheduler.check()

    @precondition(lambda self: self.harness.live)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """A stop string matches."""
        self.harness.finish(data.draw(st.sampled_from(self.harness.live)))
        self.harness.scheduler.check()

    @rule()
    def fail(self) -> None:
        """The next step fails, with all that is in it."""
        self.harness.fail_next_step()
        self.has_failure = True

    def teardown(self) -> None:
        """Everything accepted ends, once and right; all blocks come home; it can be replayed."""
        if not hasattr(self, "harness"):
            return
        for update in self.harness.engine.step(self.harness.clock.now()):
            self.harness.take(update)
        self.harness.drain()
        if self.harness.config.scheduling_policy != "srpt":  # whose foresight is in no journal
            config = self.harness.config
            again = replayed(
                self.lines,
                config,
                self.num_blocks,
                num_host_blocks=self.num_host_blocks,
                costs=LINKED,
            )
            assert again == self.lines
        reasons = {expected.finish_reason for expected in self.harness.expected.values()}
        assert self.has_failure or FinishReason.ERROR not in reasons


TestEventsInAnyOrder = pytest.mark.no_cover(EventsInAnyOrder.TestCase)
