"""A device that computes no network but checks every plan against a naive model of KV.

It remembers which ids every position of a place was written for, so a table that names the wrong
place, one that is reused too early, or a position that was never computed is an assertion, not a
wrong token. Its samples are a function of (request, position), like a seeded sampler's, so a
preempted request must produce what an undisturbed one does. Copies move what places hold to
a host tier and back, when their time has come. Time is virtual.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from math import inf

from fastserve.core.messages import (
    NO_STEP,
    Copy,
    CopyDirection,
    ExecutorOutput,
    NewRequest,
    Sample,
    SchedulerOutput,
    StepDone,
    TokenLogprobs,
    Work,
)
from fastserve.core.request import FinishReason, Handle, SamplingParams
from fastserve.sim.clock import VirtualClock


@dataclass
class _State:
    """What a worker knows of one request."""

    new: NewRequest
    token_ids: list[int]
    table: list[int] = field(default_factory=list)
    chain: list[int] = field(default_factory=list)  # position → hash of its id and all before it

    def know(self, start: int, token_ids: Sequence[int]) -> None:
        """Put ids at positions from `start` on."""
        self.token_ids[start : start + len(token_ids)] = token_ids
        del self.chain[start:]

    def chained(self, start: int, stop: int) -> list[int]:
        """Return what identifies the KV of positions [start, stop)."""
        chain, token_ids = self.chain, self.token_ids
        while len(chain) < stop:
            chain.append(hash((chain[-1] if chain else 0, token_ids[len(chain)])))
        return chain[start:stop]


@dataclass
class Running:
    """A step under way."""

    plan: SchedulerOutput
    finishes_at: float
    samples: list[Sample]
    written: set[int]
    read: set[int]
    device_s: float
    scores: dict[Handle, list[TokenLogprobs]] = field(default_factory=dict)
    error: str | None = None


@dataclass
class _Copying:
    copy: Copy
    finishes_at: float
    has_failed: bool

    @property
    def is_out(self) -> bool:
        """Whether it reads the device."""
        return self.copy.direction is CopyDirection.SWAP_OUT

    @property
    def device_blocks(self) -> tuple[int, ...]:
        """The places on the device that are read or written."""
        return self.copy.src if self.is_out else self.copy.dst

    @property
    def host_blocks(self) -> tuple[int, ...]:
        """The places on the host that are read or written."""
        return self.copy.dst if self.is_out else self.copy.src

    def is_disturbed_by(self, run: Running) -> bool:
        """Whether a step touches what the copy writes, or writes what it reads."""
        touched = run.written if self.is_out else run.written | run.read
        return not touched.isdisjoint(self.device_blocks)


def default_token(seed: int, position: int) -> int:
    """Return the id that request `seed` has at an output position: any deterministic function."""
    return (seed * 1_000_003 + position * 7919) % 50_000 + 10


def prompt_score(token_id: int, position: int) -> TokenLogprobs:
    """Return the score of a prompt id, recognizable by its id and position."""
    return TokenLogprobs(-float(position), token_id + 1, (), ())


class FakeExecutor:
    """Fits `Executor`: `num_slots` pipelined steps, or `lookahead` behind an unfinished one."""

    def __init__(
        self,
        clock: VirtualClock,
        block_size: int,
        *,
        num_slots: int = 1,
        lookahead: int = 0,
        step_s: Callable[[SchedulerOutput], float] = lambda plan: 1.0,
        copy_s: Callable[[Copy], float] = lambda copy: 1.0,
        copy_fails: Callable[[Copy], bool] = lambda copy: False,
        token: Callable[[int, int], int] = default_token,
        is_checked: bool = True,  # whether what steps read is what was computed
    ) -> None:
        self.num_slots = num_slots
        self.lookahead = lookahead
        self.clock = clock
        self.block_size = block_size
        self.step_s = step_s
        self.copy_s = copy_s
        self.copy_fails = copy_fails
        self.is_checked = is_checked
        self.num_copied = 0  # blocks, both ways
        self.token = token
        self.states: dict[int, _State] = {}
        self.device_kv: dict[int, list[int]] = {}  # place → what its positions were written for
        self.host_kv: dict[int, list[int]] = {}
        self.running: list[Running] = []
        self.copying: list[_Copying] = []
        self.plans: list[SchedulerOutput] = []  # those with work
        self.forgotten: list[int] = []
        self.is_woken = False
        self.fails_next = False  # the next step
        self.lost: dict[int, int] = {}  # handle → epoch that went with a step that failed

    def can_submit(self) -> bool:
        """Whether a slot is free for a plan with work."""
        return len(self.running) < self.num_slots + (self.lookahead if self.num_slots == 1 else 0)

    def submit(self, plan: SchedulerOutput) -> None:
        """Check a plan and carry it out at once; it is reported when its time has come."""
        assert plan.work or plan.copies or plan.forget, "an empty plan"
        self.forgotten += plan.forget
        for handle in plan.forget:
            if self.lost.pop(handle, None) is None:
                del self.states[handle]
        for new in plan.new_requests:
            self.lost.pop(new.handle, None)
            old = self.states.get(new.handle)
            assert old is None or old.new.epoch < new.epoch
            self.states[new.handle] = _State(new, list(new.cached_token_ids))
        for copy in plan.copies:
            self._begin_copy(copy)
        if plan.work:
            self._run(plan)
        else:
            assert not plan.new_requests
            assert plan.step_id == NO_STEP

    def _run(self, plan: SchedulerOutput) -> None:
        assert self.can_submit()
        self.plans.append(plan)
        in_flight = {work.handle for run in self.running for work in run.plan.work}
        if self.num_slots > 1:
            assert not in_flight & {work.handle for work in plan.work}, "slots must be disjoint"
        run = Running(plan, 0.0, [], set(), set(), self.step_s(plan))
        assert len({work.handle for work in plan.work}) == len(plan.work)
        for work in plan.work:
            if self.lost.get(work.handle) != work.epoch:
                self._execute(work, run)
            elif work.sample:
                run.samples.append(Sample(0))
        if self.fails_next:
            self._fail(run)
        start = max([self.clock.time, *(other.finishes_at for other in self.running[-1:])])
        if self.num_slots > 1:
            start = self.clock.time
        last = self.running[-1].finishes_at if self.running else 0.0
        run.finishes_at = max(start + run.device_s, last)
        self.running.append(run)

    def _begin_copy(self, copy: Copy) -> None:
        assert len(copy.src) == len(copy.dst)
        assert all(copy.copy_id != other.copy.copy_id for other in self.copying)
        copying = _Copying(copy, self.clock.time + self.copy_s(copy), self.copy_fails(copy))
        for run in self.running:
            assert not copying.is_disturbed_by(run), "a block moves under a step"
        for other in self.copying:
            for mine, theirs in (
                (copying.device_blocks, other.device_blocks),
                (copying.host_blocks, other.host_blocks),
            ):
                assert not {*mine} & {*theirs}, "two copies touch one place"
        self.copying.append(copying)
        self.num_copied += len(copy.src)

    def _end_copy(self, copying: _Copying) -> None:
        copy, source, target = copying.copy, self.device_kv, self.host_kv
        if not copying.is_out:
            source, target = target, source
        for src, dst in zip(copy.src, copy.dst, strict=True):
            target[dst] = [] if copying.has_failed else list(source.get(src, ()))

    def _fail(self, run: Running) -> None:
        """Lose the requests of a step: what it was to compute is nowhere, nor is their state."""
        self.fails_next = False
        run.error, run.samples, run.scores = "it was told to fail", [], {}
        for work in run.plan.work:
            state = self.states.pop(work.handle, None)
            self.lost[work.handle] = work.epoch
            if state is not None:
                for place, first, _ in self._places(state, work.start, work.num_tokens):
                    del self.device_kv[place][first % self.block_size :]

    def _execute(self, work: Work, run: Running) -> None:
        state = self.states[work.handle]
        assert state.new.epoch == work.epoch
        assert work.num_tokens >= 1
        assert work.table_from <= len(state.table), "the table has a hole"
        state.table[work.table_from :] = work.block_ids
        stop = work.start + work.num_tokens
        known = list(work.token_ids)
        if len(known) == work.num_tokens - 1:
            assert self.lookahead, "an id is missing"
            assert len(state.token_ids) == stop
        else:
            assert len(known) == work.num_tokens
            state.know(work.start, known)
        assert len(state.token_ids) >= stop
        assert len(state.table) * self.block_size >= stop, "no block for a position"
        for place, first, end in self._places(state, 0, work.start):
            if self.is_checked:
                kv = self.device_kv.get(place, [])[: end - first]
                assert kv == state.chained(first, end), f"KV of [{first}, {end}) is not there"
            run.read.add(place)
        fresh = set()
        for place, first, end in self._places(state, work.start, work.num_tokens):
            kv = self.device_kv.setdefault(place, [])
            kv[first % self.block_size :] = state.chained(first, end)
            fresh.add(place)
        run.written |= fresh
        self._check_races(work, fresh, run)
        if work.logits == "all":
            scored = range(max(work.start, 1), min(stop, state.new.num_prompt_tokens))
            run.scores[work.handle] = [prompt_score(state.token_ids[p], p) for p in scored]
        if work.sample:
            assert stop == len(state.token_ids)
            seed = state.new.params.seed
            assert seed is not None
            sample = self.token(seed, stop - state.new.num_prompt_tokens)
            state.token_ids.append(sample)
            run.samples.append(Sample(sample))

    def _check_races(self, work: Work, fresh: set[int], run: Running) -> None:
        """No block may be written while an earlier step of another request touches it.

        Nor may a step touch a block that is being copied.
        """
        for copying in self.copying:
            assert not copying.is_disturbed_by(run), "the block moves"
        for other in self.running:
            mine = any(earlier.handle == work.handle for earlier in other.plan.work)
            if not mine:
                assert not fresh & (other.written | other.read), "a block is reused in flight"

    def _places(self, state: _State, start: int, num_tokens: int) -> Iterator[tuple[int, int, int]]:
        """Yield the places of some positions, each with its first and the end of those in it."""
        size, stop = self.block_size, start + num_tokens
        for index in range(start // size, -(-stop // size)):
            yield state.table[index], max(start, index * size), min(stop, (index + 1) * size)

    @property
    def next_end(self) -> float:
        """When the next step or copy is done; inf where none is under way."""
        next_step = self.running[0].finishes_at if self.running else inf
        return min([next_step, *(copying.finishes_at for copying in self.copying)])

    def wait(self, until: float) -> ExecutorOutput | None:
        """Let time pass to what finishes next, to `until`, or not at all when woken."""
        if self.is_woken:
            self.is_woken = False
            return None
        if not self.clock.wait(self.next_end, until):
            return None
        ended = [copying for copying in self.copying if copying.finishes_at <= self.clock.time]
        for copying in ended:
            self.copying.remove(copying)
            self._end_copy(copying)
        steps = []
        while self.running and self.running[0].finishes_at <= self.clock.time:
            run = self.running.pop(0)
            samples = tuple(run.samples)
            steps.append(
                StepDone(run.plan.step_id, samples, run.device_s, run.scores, error=run.error)
            )
        done = tuple(copying.copy.copy_id for copying in ended if not copying.has_failed)
        failed = tuple(copying.copy.copy_id for copying in ended if copying.has_failed)
        return ExecutorOutput(tuple(steps), done, failed)

    def wake(self) -> None:
        """End the next wait early."""
        self.is_woken = True

    def close(self) -> None:
        """There is nothing to free."""


def undisturbed(
    params: SamplingParams, token: Callable[[int, int], int], eos_token_ids: Set[int]
) -> tuple[list[int], FinishReason, int | None]:
    """Return the ids, why they end and at which stop id, of a request alone on the machine."""
    assert params.seed is not None
    assert params.max_tokens is not None
    eos = frozenset() if params.ignore_eos else eos_token_ids
    ids: list[int] = []
    while len(ids) < params.max_tokens:
        ids.append(token(params.seed, len(ids)))
        if len(ids) < params.min_tokens:
            continue
        if ids[-1] in eos:
            return ids, FinishReason.STOP, None
        if ids[-1] in params.stop_token_ids:
            return ids, FinishReason.STOP, None if ids[-1] in eos_token_ids else ids[-1]
    return ids, FinishReason.LENGTH, None


def random_durations(rng: random.Random) -> Callable[[SchedulerOutput], float]:
    """Return step times that vary without reason."""
    return lambda plan: rng.uniform(0.2, 2.0)


def output_tokens(
    updates: Sequence[tuple[int, Sequence[Sample]]],
) -> dict[int, list[int]]:
    """Collect the ids of each request from (handle, samples) pairs."""
    outputs: dict[int, list[int]] = {}
    for handle, samples in updates:
        outputs.setdefault(handle, []).extend(sample.token_id for sample in samples)
    return outputs
