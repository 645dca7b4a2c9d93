"""Scheduler: facts in, plans out.

The policy orders, the scheduler packs. Each plan is one bounded scan of the policy's order: every
request in turn claims the blocks its next share needs, and what an earlier one claims, a later one
cannot have. Where blocks run out they are taken from requests further down the order with a later
estimated next schedule time, whose KV is then recomputed. To preempt a request is not to put it in
the next plan. Rules: `now` is an argument; nothing here sleeps, reads a clock or calls out.
Must not know: tensors, text, how long anything really takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastserve.core.memory.memory import KVCacheManager
from fastserve.core.memory.table import BlockTable
from fastserve.core.messages import (
    NO_STEP,
    ExecutorOutput,
    NewRequest,
    RequestMetrics,
    RequestUpdate,
    Sample,
    SchedulerOutput,
    SchedulerStats,
    StepDone,
    TokenLogprobs,
    Work,
)
from fastserve.core.packing import Packing
from fastserve.core.policies.protocol import LevelStats, Policy
from fastserve.core.request import Arrival, FinishReason, Request
from fastserve.settings.scheduler import SchedulerConfig


class StallError(RuntimeError):
    """Nothing can make progress; the message tells the story of every request."""


# One Work of a step in flight: whose it is and which table it touches. A plain tuple: one is built
# per running request and step.
_Flight = tuple[Request, BlockTable, Work]


class Scheduler:
    """Decides which tokens of which requests are computed next, and in which blocks."""

    def __init__(
        self,
        config: SchedulerConfig,
        policy: Policy,
        cache: KVCacheManager,
    ) -> None:
        self.config = config
        self.policy = policy
        self.cache = cache
        self._requests: dict[int, Request] = {}
        self._next_handle = 0
        self._next_step_id = 0
        self._in_flight: dict[int, list[_Flight]] = {}
        self._running: dict[int, Request] = {}  # in the last plan they could be in
        self._forget: list[int] = []
        self._solo: Request | None = None
        self._steps_without_progress = 0
        self._max_steps_without_progress = 1000 + 10 * -(
            -config.max_model_len // config.max_num_batched_tokens
        )
        self._num_preemptions = 0
        self._num_recomputed_tokens = 0
        self._num_computed_prompt_tokens = 0
        self._num_cached_prompt_tokens = 0
        self._num_dropped_samples = 0
        self._num_stalls = 0

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
    def handles_in_flight(self) -> set[int]:
        """Handles of the requests in these steps, those that have ended included."""
        return {work.request for flight in self._in_flight.values() for _, _, work in flight}

    def add(self, arrival: Arrival, now: float) -> int:
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
        self._next_handle += 1
        self._requests[request.handle] = request
        self.policy.admit(request, now)
        return request.handle

    def abort(self, handle: int, now: float) -> RequestUpdate | None:
        """End a request at once; None if it has ended already."""
        request = self._requests.get(handle)
        return None if request is None else self._end(request, FinishReason.ABORT, (), now)

    def finish(self, handle: int, num_output_tokens: int, now: float) -> RequestUpdate | None:
        """End a request whose text matched a stop string; None if it has ended already."""
        request = self._requests.get(handle)
        if request is None:
            return None
        self._num_dropped_samples += max(request.num_output_tokens - num_output_tokens, 0)
        return self._end(request, FinishReason.STOP, (), now)

    # ── plans go out ─────────────────────────────────────────────────────────────────────────

    def schedule(self, now: float, can_compute: bool) -> SchedulerOutput | None:
        """Return the next plan, with work only if `can_compute`; None when there is none now."""
        if can_compute and self._requests and (chosen := self._pack(now)):
            return self._plan(chosen, now)
        if self._forget:
            return SchedulerOutput(NO_STEP, (), (), forget=self._take_forgotten())
        return None

    def _pack(self, now: float) -> list[tuple[Request, int]]:
        """Return the shares of the next step, best first; empty where it has to wait."""
        self.cache.begin_plan(now)
        packing = Packing(self.config, self.cache, self.policy.reservation, len(self._requests))
        if self._solo is None:
            self.policy.advance(now)
        order: Iterator[Request] = iter((self._solo,)) if self._solo else self.policy.ordered()
        packing.scan(order)
        if packing.chosen or self._in_flight:
            return packing.trimmed()
        self._stall("nothing can run and nothing is in flight")
        return self._pack(now)

    def next_event(self, now: float) -> float:
        """Return when time alone will change what `schedule` says; `inf`: never."""
        return float("inf")

    def _take_forgotten(self) -> tuple[int, ...]:
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
            start = request.num_scheduled_tokens
            if not table.num_sent:
                new_requests.append(self._introduce(request))
            work = self._work(request, table, start, num_tokens)
            if not request.steps_in_flight:
                request.queue_s += now - request.last_ran_at
                if request.first_scheduled_at is None:
                    request.first_scheduled_at = now
            request.num_scheduled_tokens = start + num_tokens
            request.steps_in_flight += 1
            table.steps_in_flight += 1
            if work.sample:
                request.num_pending_samples += 1
            works.append(work)
            flight.append((request, table, work))
        self._note_preemptions(flight)
        step_id = self._next_step_id
        self._next_step_id += 1
        self._in_flight[step_id] = flight
        return SchedulerOutput(
            step_id, tuple(new_requests), tuple(works), forget=self._take_forgotten()
        )

    def _work(self, request: Request, table: BlockTable, start: int, num_tokens: int) -> Work:
        stop = start + num_tokens
        table_from = table.num_sent
        block_ids: tuple[int, ...] = ()
        if table_from < len(table.blocks):
            block_ids = tuple([block.device_id for block in table.blocks[table_from:]])
            table.num_sent = len(table.blocks)
        is_scored = request.params.prompt_logprobs is not None and start < request.num_prompt_tokens
        return Work(
            request.handle,
            request.epoch,
            start,
            num_tokens,
            request.token_ids(start, stop),
            table_from,
            block_ids,
            stop == request.num_tokens + request.num_pending_samples,
            "all" if is_scored else "last",
        )

    def _introduce(self, request: Request) -> NewRequest:
        """Tell the worker about a request, at the start of an epoch."""
        cached = request.num_scheduled_tokens
        if request.epoch == 0:
            self._num_cached_prompt_tokens += min(cached, request.num_prompt_tokens)
            request.num_cached_tokens = cached
        return NewRequest(
            request.handle,
            request.epoch,
            request.num_prompt_tokens,
            request.params,
            request.token_ids(0, cached),
        )

    def _note_preemptions(self, flight: list[_Flight]) -> None:
        """Count those that ran, could go on, and are not in the plan."""
        planned = {request.handle: request for request, _, _ in flight}
        for handle, request in self._running.items():
            if handle not in planned:
                if request.steps_in_flight or request.is_at_length_limit:
                    planned[handle] = request
                else:
                    request.num_preemptions += 1
                    self._num_preemptions += 1
        self._running = planned

    # ── facts: what finished ─────────────────────────────────────────────────────────────────

    def update(self, output: ExecutorOutput, now: float) -> list[RequestUpdate]:
        """Take in what finished and return the news of each request.

        Raises ValueError for a copy that no plan began.
        """
        if output.copies:
            raise ValueError(f"copies {[*output.copies]} are done, and no plan began them")
        updates: list[RequestUpdate] = []
        for done in output.steps:
            self._land(done, now, updates)
        return updates

    def _land(self, done: StepDone, now: float, updates: list[RequestUpdate]) -> None:
        if done.error is not None:
            self._land_failed(done, done.error, now, updates)
            return
        ran: list[Request] = []
        device_s = done.device_s
        samples = iter(done.samples)
        has_progress = False
        for request, table, work in self._in_flight.pop(done.step_id):
            sample = next(samples) if work.sample else None
            request.steps_in_flight -= 1
            request.last_ran_at = now
            table.steps_in_flight -= 1
            if table.is_closed:
                self.cache.landed(table)
                self._num_dropped_samples += sample is not None
                continue
            request.attained_s += device_s
            has_progress |= self._advance(request, work)
            scored = self._scored(request, work, done) if work.logits == "all" else ()
            if sample is None:
                if scored:
                    updates.append(RequestUpdate(request.handle, (), prompt_logprobs=scored))
            else:
                request.num_pending_samples -= 1
                token_id = sample.token_id
                request.append(token_id)
                if request.first_token_at is None:
                    request.first_token_at = now
                if (
                    token_id in request.stop_token_ids
                    or request.num_tokens >= request.max_num_tokens
                ) and (reason := self._finish_reason(request, token_id)) is not None:
                    updates.append(self._end(request, reason, (sample,), now, scored))
                    continue
                updates.append(RequestUpdate(request.handle, (sample,), None, None, None, scored))
            ran.append(request)
        self._note_progress(has_progress)
        self.cache.worked(device_s)
        if ran:
            self.policy.ran(ran, now)

    def _land_failed(
        self, done: StepDone, error: str, now: float, updates: list[RequestUpdate]
    ) -> None:
        """End the requests of a step that failed; one that has begun anew since goes on."""
        for request, table, work in self._in_flight.pop(done.step_id):
            request.steps_in_flight -= 1
            request.last_ran_at = now
            table.steps_in_flight -= 1
            if table.is_closed:
                self.cache.landed(table)
                self._num_dropped_samples += work.sample
            else:
                updates.append(self._end(request, FinishReason.ERROR, (), now, error=error))
        self.cache.worked(done.device_s)

    def _advance(self, request: Request, work: Work) -> bool:
        """Confirm computed tokens; return whether any of them had never been computed before."""
        before = request.num_computed_tokens
        end = before + work.num_tokens
        assert request.table is not None
        self.cache.advance(request, request.table, end)
        if before < request.num_prompt_tokens:
            self._num_computed_prompt_tokens += min(end, request.num_prompt_tokens) - before
        if end <= request.max_computed_tokens:
            repeated = work.num_tokens
        else:
            repeated = max(request.max_computed_tokens - before, 0)
            request.max_computed_tokens = end
        if repeated:
            request.num_recomputed_tokens += repeated
            self._num_recomputed_tokens += repeated
        return repeated < work.num_tokens

    def _scored(self, request: Request, work: Work, done: StepDone) -> Sequence[TokenLogprobs]:
        """Return the prompt's scores that were not delivered before a recomputation."""
        scores = done.prompt_logprobs.get(request.handle, ())
        # Position 0 has no score: the first one of a share is for position max(start, 1).
        scored = scores[max(request.num_scored_tokens + 1 - max(work.start, 1), 0) :]
        request.num_scored_tokens += len(scored)
        return scored

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        is_stop = token_id in request.stop_token_ids
        if is_stop and request.num_output_tokens >= request.params.min_tokens:
            if token_id not in self.config.eos_token_ids:
                request.stop_reason = token_id
            return FinishReason.STOP
        if request.num_tokens >= request.max_num_tokens:
            return FinishReason.LENGTH
        return None

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
        level = self._level(request)
        self.policy.finished(request, reason)
        del self._requests[request.handle]
        self._running.pop(request.handle, None)
        if request.first_scheduled_at is not None:
            self._forget.append(request.handle)
        if not request.steps_in_flight:
            request.queue_s += now - request.last_ran_at
        self.cache.release(request)
        if self._solo is request:
            self._solo = None
        request.finish_reason = reason
        metrics = RequestMetrics(
            arrival=request.arrived_at,
            first_scheduled=request.first_scheduled_at,
            first_token=request.first_token_at,
            finished=now,
            queue_s=request.queue_s,
            num_preemptions=request.num_preemptions,
            num_swaps=request.num_swaps,
            recomputed_tokens=request.num_recomputed_tokens,
            cached_tokens=request.num_cached_tokens,
            level=level,
        )
        return RequestUpdate(
            request.handle, samples, reason, request.stop_reason, metrics, scored, error
        )

    # ── progress ─────────────────────────────────────────────────────────────────────────────

    def _note_progress(self, has_progress: bool) -> None:
        """Watch for livelock: steps that only ever compute what was computed before."""
        if has_progress:
            self._steps_without_progress = 0
            return
        self._steps_without_progress += 1
        if self._steps_without_progress > self._max_steps_without_progress:
            self._steps_without_progress = 0
            self._stall("no new token")

    def _stall(self, why: str) -> None:
        """Raise in strict mode; else let the oldest request run alone until it ends."""
        if self.config.is_strict or self._solo is not None:
            raise StallError(f"{why}: {self.story()}")
        self._num_stalls += 1
        self._solo = next(iter(self._requests.values()), None)

    def story(self) -> str:
        """Return one line per live request, for errors."""
        return "; ".join(
            f"request {r.handle}: computed {r.num_computed_tokens}/{r.num_tokens}, "
            f"in flight {r.steps_in_flight}, blocks {len(r.table.blocks) if r.table else 0}, "
            f"epoch {r.epoch}, level {self._level(r)}"
            for r in self._requests.values()
        )

    def _level(self, request: Request) -> int:
        levels = self.policy.levels
        return 0 if levels is None else levels.level(request)

    def _level_stats(self) -> LevelStats:
        levels = self.policy.levels
        if levels is not None:
            return levels.stats()
        return LevelStats(0, 0, {0: len(self._requests)} if self._requests else {})

    # ── for people and tests ─────────────────────────────────────────────────────────────────

    def stats(self, now: float) -> SchedulerStats:
        """Return a snapshot of counters and sizes."""
        levels, pool = self._level_stats(), self.cache.pool
        num_started = sum(r.first_scheduled_at is not None for r in self._requests.values())
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._requests) - num_started,
            num_preempted=num_started - len(self._running),
            requests_by_level=levels.requests_by_level,
            device_blocks_total=pool.num_device_blocks,
            device_blocks_free=pool.num_free,
            device_blocks_cached=pool.num_cached,
            device_blocks_used=pool.num_used,
            host_blocks_total=0,
            host_blocks_used=0,
            num_steps=self._next_step_id,
            num_preemptions=self._num_preemptions,
            num_demotions=levels.num_demotions,
            num_promotions=levels.num_promotions,
            num_recomputed_tokens=self._num_recomputed_tokens,
            num_computed_prompt_tokens=self._num_computed_prompt_tokens,
            num_cached_prompt_tokens=self._num_cached_prompt_tokens,
            num_dropped_samples=self._num_dropped_samples,
            num_stalls=self._num_stalls,
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
            assert request.finish_reason is None
            assert request.steps_in_flight == flying.get(request.handle, 0)
            assert request.num_pending_samples == pending.get(request.handle, 0)
            assert request.num_computed_tokens <= request.num_scheduled_tokens
            assert request.num_unscheduled_tokens >= 0
            if request.table is None:
                assert request.num_scheduled_tokens == 0
            else:
                room = len(request.table.blocks) * self.config.block_size
                assert request.num_scheduled_tokens <= room
