"""Metrics: names that dashboards know, and figures that follow the engine's news."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fastserve.client.metrics import VLLM_ALIASES, EngineMetrics
from fastserve.core.request import FinishReason, SamplingParams
from fastserve.wire.engine_messages import EngineStats
from fastserve.wire.step_sizes import StepSizes
from tests.wire.test_engine_messages import INFO, METRICS, STATS

PARAMS = SamplingParams(max_tokens=40)


def read(metrics: EngineMetrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return the exported samples by name and labels, those that all have left out."""
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    samples = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            assert (sample.labels["model_name"], sample.labels["engine"]) == ("demo", "0")
            samples[sample.name, frozenset(labels.items())] = sample.value
    return samples


def snapshot(sizes: StepSizes | None = None, **changes: Any) -> EngineStats:
    """Return a snapshot with some scheduler figures changed."""
    scheduler = dataclasses.replace(STATS, **changes)
    sizes = sizes or StepSizes()
    return EngineStats(
        scheduler=scheduler,
        num_requests=6,
        scheduler_s=0.5,
        device_s=2.0,
        steps_by_tokens=sizes.counts,
        step_tokens=sizes.total,
        at=9.0,
    )


def value(metrics: EngineMetrics, name: str, **labels: str) -> float:
    """Return one sample."""
    return read(metrics)[name, frozenset(labels.items())]


@pytest.fixture
def metrics() -> EngineMetrics:
    """Return fresh metrics."""
    return EngineMetrics("demo")


def test_every_alias_stands_beside_its_own_name(metrics: EngineMetrics) -> None:
    """Each of vLLM's names is exported with the value that ours has."""
    metrics.loaded(INFO)
    metrics.snapshot(snapshot())
    samples = read(metrics)
    aliases = {key for key in samples if key[0].startswith("vllm:")}
    for alias, own in VLLM_ALIASES.items():
        found = [(name, labels) for name, labels in aliases if name.startswith("vllm:" + alias)]
        assert found, alias
        for name, labels in found:
            suffix = name.removeprefix("vllm:" + alias)
            if suffix in ("", "_total", "_bucket", "_sum", "_count"):
                assert samples[name, labels] == samples["fastserve:" + own + suffix, labels]


def test_a_request_is_counted_from_first_token_to_end(metrics: EngineMetrics) -> None:
    """Tokens, latencies and the reason of the end are counted once each."""
    metrics.first_token(7, 0.5)
    metrics.generated(1)
    metrics.next_tokens(2, 0.25)
    metrics.generated(2)
    told = dataclasses.replace(METRICS, first_scheduled=1.75)
    metrics.finished(FinishReason.STOP, 7, 3, 1.5, told, PARAMS)
    assert value(metrics, "vllm:prompt_tokens_total") == 7
    assert value(metrics, "vllm:generation_tokens_total") == 3
    assert value(metrics, "vllm:time_to_first_token_seconds_sum") == 0.5
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 2
    assert value(metrics, "vllm:time_per_output_token_seconds_sum") == 0.25
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum") == 1.5
    assert value(metrics, "fastserve:normalized_latency_seconds_sum") == 0.5
    assert value(metrics, "vllm:request_queue_time_seconds_sum") == 0.25
    assert value(metrics, "vllm:request_time_per_output_token_seconds_sum") == 0.5
    assert value(metrics, "vllm:request_params_max_tokens_sum") == PARAMS.max_tokens
    assert value(metrics, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 0


def test_an_aborted_request_has_no_latency(metrics: EngineMetrics) -> None:
    """Requests that were given up are counted, but not as if they had been served."""
    metrics.finished(FinishReason.ABORT, 7, 3, 1.5, None, PARAMS)
    assert value(metrics, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(metrics, "vllm:e2e_request_latency_seconds_count") == 0


def test_the_phases_of_a_request_add_up(metrics: EngineMetrics) -> None:
    """Queue, prefill and decode meet at the first step and the first token."""
    told = dataclasses.replace(
        METRICS, arrival=1.0, first_scheduled=1.5, first_token=2.5, finished=6.5
    )
    metrics.finished(FinishReason.STOP, 7, 1, 5.5, told, PARAMS)
    sums = {
        phase: value(metrics, f"vllm:request_{phase}_time_seconds_sum")
        for phase in ("queue", "prefill", "decode", "inference")
    }
    assert sums == {"queue": 0.5, "prefill": 1.0, "decode": 4.0, "inference": 5.0}


def test_a_request_that_never_ran_has_no_phase(metrics: EngineMetrics) -> None:
    """Its end is counted, and nothing is made up."""
    told = dataclasses.replace(METRICS, first_scheduled=None, first_token=None)
    metrics.finished(FinishReason.LENGTH, 7, 0, 1.5, told, PARAMS)
    for phase in ("queue", "prefill", "decode", "inference"):
        assert value(metrics, f"vllm:request_{phase}_time_seconds_count") == 0


def test_choices_asked_for(metrics: EngineMetrics) -> None:
    """Once a prompt, in vLLM's buckets."""
    metrics.asked(1)
    metrics.asked(7)
    assert value(metrics, "vllm:request_params_n_sum") == 8
    assert value(metrics, "vllm:request_params_n_bucket", le="5.0") == 1


def test_the_tokens_of_steps_are_a_histogram(metrics: EngineMetrics) -> None:
    """Cumulative buckets out of the engine's counts; a restarted engine's are added."""
    name = "vllm:iteration_tokens_total"
    sizes = StepSizes()
    for num_tokens in (1, 5, 8, 9, 20_000):
        sizes.add(num_tokens)
    metrics.snapshot(snapshot(sizes))
    metrics.snapshot(snapshot(sizes))
    at_most = [value(metrics, f"{name}_bucket", le=le) for le in ("1.0", "8.0", "16.0", "+Inf")]
    assert at_most == [1, 3, 4, 5]
    assert value(metrics, f"{name}_sum") == 20_023
    metrics.restarted()
    after = StepSizes()
    after.add(2)
    metrics.snapshot(snapshot(after))
    assert value(metrics, f"{name}_count") == 6
    assert value(metrics, f"{name}_sum") == 20_025


def test_a_snapshot_sets_gauges(metrics: EngineMetrics) -> None:
    """Queues, levels and blocks are those of the last snapshot; levels that emptied are gone."""
    metrics.snapshot(snapshot(requests_by_level={1: 5}))
    metrics.snapshot(snapshot())
    assert value(metrics, "vllm:num_requests_running") == 1
    assert value(metrics, "vllm:num_requests_waiting") == 5
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.5
    assert value(metrics, "fastserve:requests_by_level", level="3") == 2
    assert ("fastserve:requests_by_level", frozenset({("level", "1")})) not in read(metrics)
    assert value(metrics, "fastserve:kv_blocks", tier="device", state="free") == 4


def test_counters_go_on_over_a_restart(metrics: EngineMetrics) -> None:
    """A new engine counts from zero, the totals do not."""
    metrics.snapshot(snapshot(num_preemptions=5))
    metrics.snapshot(snapshot(num_preemptions=8))
    assert value(metrics, "vllm:num_preemptions_total") == 8
    metrics.restarted()
    metrics.snapshot(snapshot(num_preemptions=2))
    assert value(metrics, "vllm:num_preemptions_total") == 10
    assert value(metrics, "fastserve:engine_restarts_total") == 1
    assert value(metrics, "fastserve:recomputed_tokens_total") == 8


def test_two_engines_share_nothing() -> None:
    """Metrics belong to their object: a second one starts at zero."""
    first, second = EngineMetrics("demo"), EngineMetrics("demo")
    first.generated(3)
    assert value(second, "vllm:generation_tokens_total") == 0
