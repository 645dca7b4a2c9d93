"""SimExecutor: a device that computes nothing and takes as long as the cost model says.

Rules: fits `Executor`; a step passes through `num_stages` pipeline stages, each of which works on
one step at a time; `lookahead` steps may queue behind a running one. With `is_parallel` a slot is
a machine that does whole steps, beside the others. Copies go over a link beside it and slow no step
down. Time is virtual and moves only in `wait`.
Must not know: the order of requests, what is in a block, real time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import inf
from operator import attrgetter
from typing import NamedTuple

from fastserve.core.cost_model import CostModel
from fastserve.core.messages import Copy, ExecutorOutput, Sample, SchedulerOutput, StepDone
from fastserve.sim.clock import VirtualClock
from fastserve.sim.link import Link

EOS_TOKEN_ID = 0
_ORDINARY, _EOS = Sample(1), Sample(EOS_TOKEN_ID)


class StepOverhead(NamedTuple):
    """Seconds that each step costs beyond the device: fixed, and per sequence in it.

    With `has_separate_passes` the prompts of a step go through the model before its decodes, not
    in one batch with them: each pass costs its own base, on the device and on the host.
    """

    fixed_s: float = 0.0
    per_seq_s: float = 0.0
    has_separate_passes: bool = False


class _Running(NamedTuple):
    step_id: int
    finishes_at: float
    device_s: float
    samples: list[Sample]


_finishes_at = attrgetter("finishes_at")

OnStep = Callable[[SchedulerOutput, Sequence[tuple[float, float]]], None]
"""Sees each plan with the times at which every stage begins and ends it."""

OnCopy = Callable[[Copy, float, float], None]
"""Sees each copy with the times at which the link begins and ends it."""


class SimExecutor:
    """`ends` maps a handle to the number of tokens, prompt included, at which its EOS is drawn."""

    def __init__(
        self,
        clock: VirtualClock,
        cost_model: CostModel,
        ends: Mapping[int, int],
        *,
        num_stages: int = 1,
        lookahead: int = 0,
        is_parallel: bool = False,
        overhead: StepOverhead = StepOverhead(),  # noqa: B008 - an immutable tuple
        on_step: OnStep | None = None,
        on_copy: OnCopy | None = None,
    ) -> None:
        self.num_slots = num_stages
        self.lookahead = lookahead if num_stages == 1 else 0
        self.busy_s = 0.0
        self.num_steps = 0
        self._is_parallel = is_parallel
        self._clock = clock
        self._cost_model = cost_model
        self._ends = ends
        self._overhead = overhead
        self._on_step = on_step
        self._on_copy = on_copy
        self._link = Link(cost_model)
        self._max_running = num_stages + self.lookahead
        self._stage_free_at = [0.0] * num_stages
        self._running: deque[_Running] = deque()
        self._is_woken = False

    def can_submit(self) -> bool:
        """Whether the first stage's queue has room."""
        return len(self._running) < self._max_running

    def submit(self, plan: SchedulerOutput) -> None:
        """Work out when the step and the copies will be done, and what the step will yield."""
        for copy in plan.copies:
            begins_at, ends_at = self._link.begin(copy, self._clock.time)
            if self._on_copy is not None:
                self._on_copy(copy, begins_at, ends_at)
        if plan.work:
            self._run(plan)

    def _run(self, plan: SchedulerOutput) -> None:
        passes = self._passes(plan)
        step_s = sum(map(self._cost_model.step_s, passes))
        overhead = self._overhead
        overhead_s = overhead.fixed_s * len(passes) + overhead.per_seq_s * len(plan.work)
        ready_at = self._clock.time + overhead_s
        stages: list[tuple[float, float]] = []
        if self._is_parallel:  # there is no step in one of the machines, else there were no slot
            stage_s = step_s
            stages.append((ready_at, ready_at + step_s))
            ready_at += step_s
        else:
            stage_s = step_s / self.num_slots
            for stage, free_at in enumerate(self._stage_free_at):
                begins_at = max(ready_at, free_at)
                ready_at = begins_at + stage_s
                self._stage_free_at[stage] = ready_at
                stages.append((begins_at, ready_at))
        if self._on_step is not None:
            self._on_step(plan, stages)
        ends = self._ends
        samples = [
            _EOS if work.start + work.num_tokens + 1 >= ends[work.handle] else _ORDINARY
            for work in plan.work
            if work.sample
        ]
        self.busy_s += stage_s
        self.num_steps += 1
        # A request is billed its share of the machine: the stages' sum over the steps in flight.
        running = _Running(plan.step_id, ready_at, stage_s + overhead_s, samples)
        self._running.insert(bisect_right(self._running, ready_at, key=_finishes_at), running)

    def _passes(self, plan: SchedulerOutput) -> list[list[tuple[int, int]]]:
        """Return the shares of a step as (num_tokens, start), by the pass they go through in."""
        shares = [(work.num_tokens, work.start) for work in plan.work]
        if not self._overhead.has_separate_passes:
            return [shares]
        prompts = [share for share in shares if share[0] > 1]
        decodes = [share for share in shares if share[0] == 1]
        return [passed for passed in (prompts, decodes) if passed]

    @property
    def next_end(self) -> float:
        """When the next step or copy will be done; inf where none is under way."""
        next_step = self._running[0].finishes_at if self._running else inf
        return min(next_step, self._link.next_end)

    def wait(self, until: float) -> ExecutorOutput | None:
        """Let time pass to what finishes next, a step or a copy, or to `until` if that is sooner.

        Returns all that has finished by then.
        """
        if self._is_woken:
            self._is_woken = False
            return None
        if not self._clock.wait(self.next_end, until):
            return None
        now = self._clock.time
        steps = []
        while self._running and self._running[0].finishes_at <= now:
            done = self._running.popleft()
            steps.append(StepDone(done.step_id, done.samples, done.device_s))
        return ExecutorOutput(steps, self._link.ended(now))

    def wake(self) -> None:
        """End the next wait early."""
        self._is_woken = True

    def close(self) -> None:
        """There is nothing to free."""
