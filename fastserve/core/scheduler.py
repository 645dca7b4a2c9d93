"""Scheduler: facts in, plans out.

The policy orders, the scheduler packs. Each plan is one bounded scan of the policy's order: every
request in turn claims the blocks its next share needs, and what an earlier one claims, a later one
cannot have. Where blocks run out they are taken from colder requests further down the order, whose
KV moves to the host or is recomputed. To preempt a request is not to put it in the next plan.
Rules: `now` is an argument; nothing here sleeps, reads a clock or calls out.
Must not know: tensors, text, how long anything really takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from fastserve.core.accounts import Accounts, level_of, predicted_tokens_of
from fastserve.core.memory.memory import KVCacheManager
from fastserve.core.memory.table import BlockTable
from fastserve.core.messages import (
    NO_STEP,
    NO_TOKEN,
    NOT_FINITE,
    ExecutorOutput,
    NewRequest,
    RequestUpdate,
    Sample,
    SchedulerOutput,
    SchedulerStats,
    StepDone,
    TokenLogprobs,
    Work,
)
from fastserve.core.packing import Packing
from fastserve.core.policies.protocol import Policy
from fastserve.core.request import Arrival, FinishReason, Handle, Request
from fastserve.core.shares import end_at, introduction, new_scores, work_of
from fastserve.core.stalls import Stalls
from fastserve.settings.scheduler import SchedulerConfig

# One Work of a step in flight: whose it is and which table it touches. A plain tuple: one is built
# per running request and step.
_Flight = tuple[Request, BlockTable, Work]


class Scheduler:
    """Decides which tokens of which requests are computed next, and in which blocks."""

    def __init__(self, config: SchedulerConfig, policy: Policy, cache: KVCacheManager) -> None:
        self.config = config
        self.policy = policy
        self.cache = cache
        self._requests: dict[Handle, Request] = {}
        self._next_handle = Handle(0)
        self._in_flight: dict[int, list[_Flight]] = {}
        self._forget: list[Handle] = []
        self._ordered_at = inf  # the time of the latest plan's order; inf: it needed none
        self._accounts = Accounts()
        self._counters = self._accounts.counters
        self._stalls = Stalls(config, self._requests, policy, self._counters)

    # ── facts: requests come and go ──────────────────────────────────────────────────────────

    @property
    def num_requests(self) -> int:
        """Live requests."""
        return len(self._requests)

    @property
    def num_steps_in_flight(self) -> int:
        """Steps that were planned and have not landed."""
        return len(self._in_flight)

    @property
    def num_copies_in_flight(self) -> int:
        """Copies between the tiers that were planned and have not been reported."""
        return self.cache.num_copies

    @property
    def handles_in_flight(self) -> set[Handle]:
        """Handles of the requests in these steps, those that have ended included."""
        return {work.handle for flight in self._in_flight.values() for _, _, work in flight}

    def add(self, arrival: Arrival, now: float) -> Handle:
        """Take a request in and return its handle; ValueError when it could never run."""
        params = arrival.params
        window = self.config.max_model_len
        num_prompt_tokens = len(arrival.prompt_token_ids)
        max_output_tokens = params.max_tokens or window - num_prompt_tokens
        if num_prompt_tokens < 1:
            raise ValueError("The prompt is empty.")
        # One token may follow a prompt that fills the window: its KV is never needed.
        num_positions = num_prompt_tokens + max_output_tokens - (max_output_tokens == 1)
        if max_output_tokens < 1 or num_positions > window:
            raise ValueError(
                f"The prompt of {num_prompt_tokens} tokens and {max_output_tokens} output tokens "
                f"exceed the {window} tokens that fit."
            )
        if len(arrival.output_token_ids) >= max_output_tokens:
            raise ValueError("The request has all of its output tokens already.")
        request = Request(
            self._next_handle,
            arrival,
            now,
            max_output_tokens=max_output_tokens,
            stop_token_ids=params.ending_ids(self.config.eos_token_ids),
        )
        request.num_cached_tokens = self.cache.probe(request)
        self._next_handle = Handle(self._next_handle + 1)
        self._requests[request.handle] = request
        self.policy.admit(request, now)
        return request.handle

    def abort(self, handle: Handle, now: float) -> RequestUpdate | None:
        """End a request at once; None if it has ended already."""
        request = self._requests.get(handle)
        return None if request is None else self._end(request, FinishReason.ABORT, (), now)

    def finish(self, handle: Handle, num_output_tokens: int, now: float) -> RequestUpdate | None:
        """End a request whose text matched a stop string; None if it has ended already."""
        request = self._requests.get(handle)
        if request is None:
            return None
        self._counters.num_dropped_samples += max(request.num_output_tokens - num_output_tokens, 0)
        return self._end(request, FinishReason.STOP, (), now)

    # ── plans go out ─────────────────────────────────────────────────────────────────────────

    def schedule(self, now: float, can_compute: bool) -> SchedulerOutput | None:
        """Return the next plan, with work only if `can_compute`; None when there is none now."""
        self._ordered_at = inf
        if can_compute and self._requests and (chosen := self._pack(now)):
            return self._plan(chosen, now)
        copies = self.cache.copies(now)
        if copies or self._forget:
            return SchedulerOutput(NO_STEP, (), (), copies, self._take_forgotten())
        return None

    def _pack(self, now: float) -> list[tuple[Request, int]]:
        """Return the shares of the next step, best first; empty where it has to wait."""
        self.cache.begin_plan(now)
        packing = Packing(self.config, self.cache, self.policy.reservation, len(self._requests))
        if self._stalls.alone is not None:
            packing.scan((self._stalls.alone,))
        else:
            self.policy.advance(now)
            self._ordered_at = now
            packing.scan(self.policy.ordered())
        if packing.chosen or self._in_flight:
            return packing.trimmed()
        if self.cache.num_copies:
            self._accounts.waits_for_copies(now)
            return []
        self._stalls.stalled("nothing can run and nothing is in flight")
        return self._pack(now)

    def next_event(self, now: float) -> float:
        """Return when time alone may change what `schedule` says; inf: only facts will.

        Time changes the order of requests, which does not matter while no slot is free. What was
        due when `schedule` was last called has had its say then.
        """
        if self._ordered_at == inf:
            return inf
        event = self.policy.next_event(now)
        return event if event > self._ordered_at else inf

    def _take_forgotten(self) -> tuple[Handle, ...]:
        forget, self._forget = tuple(self._forget), []
        return forget

    def _plan(self, chosen: list[tuple[Request, int]], now: float) -> SchedulerOutput:
        """Turn shares into a step in flight."""
        new_requests: list[NewRequest] = []
        flight: list[_Flight] = []
        works: list[Work] = []
        for request, num_tokens in chosen:
            table = request.table
            assert table is not None
            if not table.is_known:
                table.is_known = True
                new_requests.append(self._introduce(request))
            work = work_of(request, table, num_tokens)
            request.num_scheduled_tokens += num_tokens
            request.steps_in_flight += 1
            table.steps_in_flight += 1
            if work.sample:
                request.num_pending_samples += 1
            works.append(work)
            flight.append((request, table, work))
        step_id = self._counters.num_steps
        self._accounts.planned(chosen, now)
        self._in_flight[step_id] = flight
        return SchedulerOutput(
            step_id,
            tuple(new_requests),
            tuple(works),
            self.cache.copies(now),
            self._take_forgotten(),
        )

    def _introduce(self, request: Request) -> NewRequest:
        """Tell the worker about a request, at the start of an epoch."""
        if request.epoch == 0:
            cached = request.num_scheduled_tokens
            self._counters.num_cached_prompt_tokens += min(cached, request.num_prompt_tokens)
            request.num_cached_tokens = cached
        return introduction(request)

    # ── facts: what finished ─────────────────────────────────────────────────────────────────

    def update(self, output: ExecutorOutput, now: float) -> list[RequestUpdate]:
        """Take in what finished and return the news of each request.

        Raises ValueError for a copy that no plan began.
        """
        for copy_id in output.copies:
            self.cache.copied(copy_id)
        for copy_id in output.failed_copies:
            self.cache.copied(copy_id, has_failed=True)
        updates: list[RequestUpdate] = []
        for done in output.steps:
            flight = self._take_landed(done.step_id, now)
            if done.error is None:
                self._land(flight, done, now, updates)
            else:  # one that has begun anew since goes on
                updates += [
                    self._end(request, FinishReason.ERROR, (), now, error=done.error)
                    for request, table, _ in flight
                    if not table.is_closed
                ]
            self.cache.worked(done.device_s)
        return updates

    def _take_landed(self, step_id: int, now: float) -> list[_Flight]:
        """Take a step out of the air; tables that were closed under it may go with it."""
        flight = self._in_flight.pop(step_id)
        for request, table, work in flight:
            request.steps_in_flight -= 1
            request.last_ran_at = now
            table.steps_in_flight -= 1
            if table.is_closed:
                self._counters.num_dropped_samples += work.sample
            if table.is_closed or table.is_draining:
                self.cache.landed(table)
        return flight

    def _land(
        self, flight: list[_Flight], done: StepDone, now: float, updates: list[RequestUpdate]
    ) -> None:
        """Take in what a step computed: confirm KV, append samples, end requests."""
        ran: list[Request] = []
        samples, device_s = iter(done.samples), done.device_s
        eos_token_ids = self.config.eos_token_ids
        advance, computed = self.cache.advance, self._accounts.computed
        has_progress = False
        for request, table, work in flight:
            sample = next(samples) if work.sample else None
            if table.is_closed:
                continue
            request.attained_s += device_s
            if sample is not None and sample.token_id == NO_TOKEN:
                self.cache.distrust(request)
                updates.append(self._end(request, FinishReason.ERROR, (), now, error=NOT_FINITE))
                continue
            before = request.num_computed_tokens
            end = before + work.num_tokens
            advance(request, table, end)
            has_progress |= computed(request, before, end)
            scored = new_scores(request, work.start, done) if work.logits == "all" else ()
            if sample is not None:
                token_id = sample.token_id
                request.num_pending_samples -= 1
                request.append(token_id)
                if request.first_token_at is None:
                    request.first_token_at = now
                is_candidate = (
                    token_id in request.stop_token_ids
                    or request.num_tokens >= request.max_num_tokens
                )
                if is_candidate and (reason := end_at(request, token_id, eos_token_ids)):
                    updates.append(self._end(request, reason, (sample,), now, scored))
                    continue
                updates.append(RequestUpdate(request.handle, (sample,), None, None, None, scored))
            elif scored:
                updates.append(RequestUpdate(request.handle, (), prompt_logprobs=scored))
            ran.append(request)
        self._stalls.landed(has_progress)
        if ran:
            self.policy.ran(ran, now)

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        samples: tuple[Sample, ...],
        now: float,
        scored: Sequence[TokenLogprobs] = (),
        error: str | None = None,
    ) -> RequestUpdate:
        """Let go of everything a request holds and write its terminal event."""
        level = level_of(self.policy, request)
        predicted_tokens = predicted_tokens_of(self.policy, request)
        self.policy.finished(request, reason)
        del self._requests[request.handle]
        if request.first_scheduled_at is not None:
            self._forget.append(request.handle)
        self.cache.release(request)
        self._stalls.ended(request)
        metrics = self._accounts.closed(request, level, predicted_tokens, now)
        return RequestUpdate(
            request.handle, samples, reason, request.stop_reason, metrics, scored, error
        )

    # ── for people and tests ─────────────────────────────────────────────────────────────────

    def stats(self) -> SchedulerStats:
        """Return a snapshot of counters and sizes."""
        return self._accounts.snapshot(
            len(self._requests), self.policy, self.cache.pool, self.cache.moves
        )

    def check(self) -> None:
        """Assert every invariant of the scheduler, the cache and the pool."""
        self.cache.check(self._requests.values())
        flying: dict[int, int] = {}
        pending: dict[int, int] = {}
        for flight in self._in_flight.values():
            for request, table, work in flight:
                flying[request.handle] = flying.get(request.handle, 0) + 1
                if not table.is_closed:
                    assert request.table is table
                    pending[request.handle] = pending.get(request.handle, 0) + work.sample
        for request in self._requests.values():
            assert request.steps_in_flight == flying.get(request.handle, 0)
            assert request.num_pending_samples == pending.get(request.handle, 0)
            assert request.num_computed_tokens <= request.num_scheduled_tokens
            assert request.num_unscheduled_tokens >= 0
            if request.table is None:
                assert request.num_scheduled_tokens == 0
            else:
                room = len(request.table.blocks) * self.config.block_size
                assert request.num_scheduled_tokens <= room
