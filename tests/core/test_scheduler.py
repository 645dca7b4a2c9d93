"""The scheduler's promises to a request: how it ends, what it is told, and when blocks are free."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from fastserve.core.build import build_scheduler
from fastserve.core.messages import NO_TOKEN, NOT_FINITE, ExecutorOutput, Sample, StepDone
from fastserve.core.policies.parts import Deadlines
from fastserve.core.request import Arrival, FinishReason, Handle, SamplingParams
from fastserve.settings.scheduler import pool_window
from tests.core.builders import one_second
from tests.core.harness import UNIT_COST, Harness, small_config
from tests.fake_executor import default_token, undisturbed

EOS, STOP = 900, 901
PIPELINES = ((1, 0), (1, 1), (2, 0))


def says(*ids: int) -> Harness:
    """Return a harness whose device says the same to everybody."""
    config = small_config(eos_token_ids=frozenset((EOS,)))
    return Harness(config, 64, token=lambda seed, p: ids[min(p, len(ids) - 1)], step_s=one_second)


@pytest.mark.parametrize(
    ("params", "length", "reason", "stop_reason"),
    [
        ({}, 3, FinishReason.STOP, None),
        ({"min_tokens": 3}, 3, FinishReason.STOP, None),
        ({"min_tokens": 4}, 6, FinishReason.STOP, None),
        ({"min_tokens": 7}, 8, FinishReason.LENGTH, None),
        ({"ignore_eos": True}, 8, FinishReason.LENGTH, None),
        ({"ignore_eos": True, "stop_token_ids": [STOP]}, 4, FinishReason.STOP, STOP),
        ({"stop_token_ids": [STOP]}, 3, FinishReason.STOP, None),
        ({"stop_token_ids": [STOP], "min_tokens": 4}, 4, FinishReason.STOP, STOP),
        ({"stop_token_ids": [1]}, 1, FinishReason.STOP, 1),
        ({"max_tokens": 2}, 2, FinishReason.LENGTH, None),
        ({"max_tokens": 3}, 3, FinishReason.STOP, None),
    ],
)
def test_how_a_request_ends(
    params: dict[str, Any], length: int, reason: FinishReason, stop_reason: int | None
) -> None:
    """EOS, stop ids and the limit, each in its turn; an ending id is among the samples."""
    harness = says(1, 2, EOS, STOP, 3, EOS, 4, 5)
    handle = harness.add([7, 8], **({"max_tokens": 8} | params))
    harness.drain()
    expected = harness.expected[handle]
    assert expected.last is not None
    assert len(expected.received) == length
    assert (expected.last.finish_reason, expected.last.stop_reason) == (reason, stop_reason)


@pytest.mark.parametrize("policy", ["fcfs", "orca", "static", "skip-join-mlfq"])
@pytest.mark.parametrize("is_chunked", [True, False])
def test_one_token_follows_a_prompt_that_fills_the_window(policy: str, is_chunked: bool) -> None:
    """In a pool of just the window: the token's own KV is never needed."""
    config = small_config(
        scheduling_policy=policy,
        enable_chunked_prefill=is_chunked,
        max_num_batched_tokens=16 if is_chunked else 64,
    )
    harness = Harness(config, 16)
    harness.add(range(64), 1, prompt_logprobs=0)
    harness.add(range(64), 1)
    harness.drain()


@pytest.mark.parametrize(
    ("num_prompt", "params", "earlier", "message"),
    [
        (0, {}, 0, "empty"),
        (64, {"max_tokens": 2}, 0, "exceed"),
        (65, {"max_tokens": 1}, 0, "exceed"),
        (60, {"max_tokens": 5}, 0, "exceed"),
        (64, {"max_tokens": None}, 0, "exceed"),
        (5, {"max_tokens": 3}, 3, "already"),
    ],
)
def test_what_could_never_run_is_refused(
    num_prompt: int, params: dict[str, Any], earlier: int, message: str
) -> None:
    """A clear error, no handle, and nothing left behind."""
    scheduler = build_scheduler(small_config(), UNIT_COST, 64)
    with pytest.raises(ValueError, match=message):
        scheduler.add(
            Arrival(range(num_prompt), SamplingParams(**params), output_token_ids=[1] * earlier),
            0.0,
        )
    assert scheduler.num_requests == 0
    assert scheduler.add(Arrival([1], SamplingParams()), 0.0) == 0
    assert scheduler.add(Arrival([1], SamplingParams()), 0.0) == 1


def test_the_pool_bounds_the_window() -> None:
    """A request that fits the window but not the whole pool is refused at the door."""
    window = pool_window(small_config().max_model_len, 3, small_config().block_size)
    scheduler = build_scheduler(small_config(max_model_len=window), UNIT_COST, 3)
    with pytest.raises(ValueError, match="12 tokens"):
        scheduler.add(Arrival(range(10), SamplingParams(max_tokens=3)), 0.0)
    scheduler.add(Arrival(range(10), SamplingParams(max_tokens=2)), 0.0)


def test_no_limit_means_what_the_window_leaves() -> None:
    """max_tokens=None runs to the end of the window, and the last block is enough."""
    harness = Harness(small_config(max_model_len=16, block_size=4), 4, step_s=one_second)
    handle = harness.engine.add(Arrival(range(10), SamplingParams(max_tokens=None, seed=1)))
    received = 0
    while harness.is_busy:
        for update in harness.engine.step():
            received += len(update.samples)
        harness.scheduler.check()
    assert (handle, received) == (0, 6)


def test_an_earlier_life_goes_on_where_it_was() -> None:
    """A request added with ids it had yields exactly the rest."""
    harness = Harness(small_config(), 64, step_s=one_second)
    params = SamplingParams(max_tokens=9, seed=5)
    whole, _, _ = undisturbed(params, default_token, frozenset())
    harness.engine.add(Arrival([1, 2, 3], params, age_s=3.0, output_token_ids=whole[:4]))
    rest, last = [], None
    while harness.is_busy:
        for last in harness.engine.step():
            rest += [sample.token_id for sample in last.samples]
    assert rest == whole[4:]
    assert last is not None
    assert last.metrics is not None
    assert last.metrics.arrival == -3.0


@pytest.mark.parametrize("act", ["abort", "finish"])
def test_ending_with_a_step_in_flight(act: str) -> None:
    """The terminal event is immediate, blocks wait for the step, late samples are dropped."""
    harness = Harness(small_config(lookahead=1), 4, step_s=one_second)
    handle = harness.add(range(6), 9)
    harness.step()
    harness.executor.wake()
    harness.step()
    assert harness.request(handle).steps_in_flight == 2
    getattr(harness, act)(handle)
    harness.scheduler.check()
    stats = harness.scheduler.stats()
    assert (harness.scheduler.num_requests, stats.device_blocks_used) == (0, 2)
    other = harness.add(range(100, 114), 2)  # needs all four blocks
    harness.executor.wake()
    harness.step()
    assert harness.request(other).steps_in_flight == 0, "blocks were reused in flight"
    harness.drain()
    assert harness.scheduler.stats().num_dropped_samples == 2
    assert len(harness.executor.plans) >= 4


def test_eos_with_a_step_in_flight_drops_one_sample() -> None:
    """At lookahead 1 the step behind an EOS was for nothing: one sample is dropped, and counted."""
    config = small_config(lookahead=1, eos_token_ids=frozenset((EOS,)))
    harness = Harness(config, 8, token=lambda seed, p: (1, 2, EOS, 4)[p], step_s=one_second)
    harness.add(range(6), 4)
    harness.drain()
    assert harness.scheduler.stats().num_dropped_samples == 1


def test_the_length_limit_drops_nothing() -> None:
    """Limits are known at plan time: no step is planned behind the last sample."""
    harness = Harness(small_config(lookahead=1), 8, step_s=one_second)
    harness.add(range(6), 4)
    harness.drain()
    assert harness.scheduler.stats().num_dropped_samples == 0
    assert sum(work.sample for plan in harness.executor.plans for work in plan.work) == 4


def test_unknown_and_ended_requests_end_quietly() -> None:
    """abort and finish answer None where there is nothing to end."""
    scheduler = build_scheduler(small_config(max_model_len=32), UNIT_COST, 8)
    assert scheduler.abort(Handle(7), 0.0) is None
    assert scheduler.finish(Handle(7), 0, 0.0) is None
    assert scheduler.schedule(0.0, True) is None
    handle = scheduler.add(Arrival([1], SamplingParams()), 0.0)
    assert scheduler.schedule(0.0, False) is None
    update = scheduler.abort(handle, 1.0)
    assert update is not None
    assert update.metrics is not None
    assert update.metrics.first_scheduled is None
    assert update.metrics.queue_s == 1.0
    assert scheduler.abort(handle, 1.0) is None
    scheduler.check()


def test_the_worker_is_told_to_forget_exactly_those_it_knows() -> None:
    """Each handle that was sent is forgotten once, with the next plan or alone; others never."""
    harness = Harness(small_config(max_num_seqs=1), 64, step_s=one_second)
    for handle in range(4):
        harness.add([10 * handle, 1], 2)
    harness.step()
    harness.abort(3)
    harness.drain()
    assert [plan.forget for plan in harness.executor.plans if plan.forget] == [(0,), (1,)]
    assert harness.executor.forgotten == [0, 1, 2]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_prompt_scores_come_exactly_once(pipeline: tuple[int, int]) -> None:
    """Chunks, preemption and recomputation in the middle of a prompt repeat and lose none."""
    num_rescored = 0
    for seed in range(60):
        rng = Random(seed)
        config = small_config(
            max_num_seqs=2,
            max_num_batched_tokens=rng.choice((3, 5, 7)),
            max_model_len=24,
            scheduling_policy="mlfq",
            starvation_limit=rng.choice((0.0, 1.0, 4.0)),
            enable_prefix_caching=True,
            num_slots=pipeline[0],
            lookahead=pipeline[1],
        )
        harness = Harness(config, 7, seed=seed)
        for _ in range(6):
            length = rng.randrange(1, 22)
            harness.add([*range(length)], rng.randrange(1, 25 - length), prompt_logprobs=0)
            harness.step()
        harness.drain()  # the harness compares the scores with the prompt's
        for expected in harness.expected.values():
            assert expected.last is not None
            assert expected.last.metrics is not None
            num_rescored += expected.last.metrics.recomputed_tokens > 0
    assert num_rescored > 20


def test_a_recomputed_request_is_a_new_epoch_to_the_worker() -> None:
    """Preempted for its blocks, it comes back whole: new epoch, known output, the same tokens."""
    config = small_config(max_num_seqs=2, max_num_batched_tokens=32, max_model_len=32)
    harness = Harness(config, 8, step_s=one_second)
    victim = harness.add(range(10), 16, priority=1)
    for _ in range(4):
        harness.step()
    harness.add(range(100, 128), 4)
    harness.drain()
    news = [new for plan in harness.executor.plans for new in plan.new_requests if new[0] == victim]
    assert [new.epoch for new in news] == [0, 1]
    work = next(w for plan in harness.executor.plans for w in plan.work if w.epoch == 1)
    assert (work.start, work.num_tokens) == (0, 14)
    last = harness.expected[victim].last
    assert last is not None
    assert last.metrics is not None
    assert (last.metrics.num_preemptions, last.metrics.recomputed_tokens) == (1, 13)
    stats = harness.scheduler.stats()
    assert (stats.num_preemptions, stats.num_recomputed_tokens) == (1, 13)


def test_a_step_that_fails_ends_nobody_who_has_begun_anew() -> None:
    """Who lost its KV while the step was in flight needs nothing of it: it is computed again."""
    config = small_config(max_num_seqs=2, max_num_batched_tokens=64, max_model_len=32, num_slots=2)
    harness = Harness(config, 8, step_s=one_second)
    victim = harness.add(range(10), 16, priority=1)
    for _ in range(4):
        harness.step()
    harness.fail_next_step()
    harness.executor.wake()
    harness.step()
    assert harness.executor.running[0].error is not None
    harness.add(range(100, 128), 4)
    harness.executor.wake()
    harness.step()
    request = harness.request(victim)
    assert (request.epoch, request.steps_in_flight) == (1, 1)
    harness.drain()
    assert harness.num_errors == 0
    assert harness.expected[victim].finish_reason is FinishReason.LENGTH


def test_prefix_hits_are_counted_and_spare_work() -> None:
    """The second of two equal prompts computes only its last block."""
    harness = Harness(small_config(enable_prefix_caching=True), 64, step_s=one_second)
    harness.add(range(16), 2)
    harness.drain()
    second = harness.add(range(16), 2)
    harness.drain()
    works = [w for plan in harness.executor.plans for w in plan.work if w.handle == second]
    assert [(work.start, work.num_tokens) for work in works] == [(12, 4), (16, 1)]
    assert harness.scheduler.stats().num_cached_prompt_tokens == 12
    last = harness.expected[second].last
    assert last is not None
    assert last.metrics is not None
    assert last.metrics.cached_tokens == 12


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_logits_that_are_no_numbers_end_one_request(pipeline: tuple[int, int]) -> None:
    """It ends with an error and no token more; the others get theirs when they would have anyway.

    Nobody finds its KV afterwards, nor what it had found itself.
    """
    num_slots, lookahead = pipeline
    config = small_config(enable_prefix_caching=True, num_slots=num_slots, lookahead=lookahead)
    finished = []
    for last in (NO_TOKEN, EOS):  # of the request in the middle, its third

        def token(seed: int, position: int, last: int = last) -> int:
            return last if (seed, position) == (2, 2) else default_token(seed, position)

        harness = Harness(
            replace(config, eos_token_ids=frozenset((EOS,))),
            64,
            step_s=one_second,
            token=token,
        )
        harness.add(range(12), 1, seed=9)
        harness.drain()
        handles = [harness.add(range(100, 110), 9, seed=1), harness.add(range(16), 9, seed=2)]
        handles.append(harness.add(range(200, 210), 9, seed=3))
        harness.drain()
        ends = [harness.expected[handle].last for handle in handles]
        finished.append([end.metrics.finished for end in ends if end and end.metrics])
        again = harness.add(range(16), 2, seed=4)
        harness.drain()
        works = [work for plan in harness.executor.plans for work in plan.work]
        first = next(work for work in works if work.handle == again)
        reasons = [end.finish_reason for end in ends if end]
        if last == EOS:
            assert (reasons[1], first.start) == (FinishReason.STOP, 12)
            continue
        assert reasons == [FinishReason.LENGTH, FinishReason.ERROR, FinishReason.LENGTH]
        bad = ends[1]
        assert bad is not None
        assert bad.metrics is not None
        assert (bad.error, bad.samples, bad.metrics.cached_tokens) == (NOT_FINITE, (), 12)
        assert len(harness.expected[handles[1]].received) == 2
        assert first.start == 0
    assert finished[0] == finished[1]


def test_a_prefix_is_found_under_its_own_salt_only() -> None:
    """Another salt's KV is computed anew, and then found as well."""
    harness = Harness(small_config(enable_prefix_caching=True), 64, step_s=one_second)
    cached = []
    for salt in ("a", "b", "", "a", "b", ""):
        handle = harness.add(range(16), 2, cache_salt=salt)
        harness.drain()
        last = harness.expected[handle].last
        assert last is not None
        assert last.metrics is not None
        cached.append(last.metrics.cached_tokens)
        first = next(w for plan in harness.executor.plans for w in plan.work if w.handle == handle)
        assert first.start == cached[-1]
    assert cached == [0, 0, 0, 12, 12, 12]


def test_a_prefix_on_the_host_is_found_under_its_own_salt_only() -> None:
    """Its places on the device are others' by then; it is brought in, and not for a stranger."""
    config = small_config(enable_prefix_caching=True, preemption_mode="proactive", max_model_len=32)
    costs = replace(UNIT_COST, copy_base_s=0.001, copy_block_s=0.001)
    harness = Harness(config, 8, 64, step_s=one_second, costs=costs)
    cached = {}
    for number, salt in enumerate(("a", "b", "a")):
        handle = harness.add(range(16), 2, cache_salt=salt)
        harness.drain()
        last = harness.expected[handle].last
        assert last is not None
        assert last.metrics is not None
        cached[number] = last.metrics.cached_tokens
        stats = harness.scheduler.stats()
        harness.add(range(100 * number + 100, 100 * number + 128), 4)
        harness.drain()
    assert cached == {0: 0, 1: 0, 2: 12}
    assert stats.num_swapped_in_blocks == 3
    assert stats.num_saved_blocks > 3


def test_times_add_up() -> None:
    """Queueing is arrival → plan plus every pause; nothing is counted twice."""
    config = small_config(max_num_seqs=1)
    harness = Harness(config, 64, step_s=one_second)
    first, second = harness.add([1, 2], 3), harness.add([3, 4], 2)
    harness.drain()
    metrics = [harness.expected[handle].last for handle in (first, second)]
    assert [(m.metrics.queue_s, m.metrics.finished) for m in metrics if m and m.metrics] == [
        (0.0, 3.0),
        (3.0, 5.0),
    ]


def test_nothing_grows_with_the_requests_that_were() -> None:
    """After thousands of requests the scheduler holds what it held after one."""
    config = small_config(scheduling_policy="skip-join-mlfq", starvation_limit=1e6)
    scheduler = build_scheduler(config, UNIT_COST, 16)
    now = 0.0
    for number in range(6000):
        handle = scheduler.add(
            Arrival([number, 1], SamplingParams(max_tokens=2), priority=number % 2), now
        )
        while scheduler.num_requests:
            plan = scheduler.schedule(now, True)
            assert plan is not None
            now += 1.0
            samples = [Sample(handle)] * sum(work.sample for work in plan.work)
            scheduler.update(ExecutorOutput([StepDone(plan.step_id, samples, 1.0)]), now)
    scheduler.check()
    assert len(scheduler._forget) == 1
    sizes = []
    deadlines = [v for v in vars(scheduler.policy).values() if isinstance(v, Deadlines)]
    assert deadlines
    parts = (scheduler, scheduler.cache, scheduler.cache.pool, scheduler.policy, *deadlines)
    for part in parts:
        sizes += [len(v) for v in vars(part).values() if isinstance(v, dict | list | set)]
    assert max(sizes) <= 66
