"""Prometheus metrics of the API process, fed with what the engine reports.

Rules: one table of names; a registry of one's own, nothing global; every name is exported with the
prefix `fastserve:`, and those that vLLM has too are repeated with `vllm:`, so that its dashboards
work. Snapshots are set, news is counted. A restarted engine counts from zero; these totals go on.
Must not know: torch, HTTP, how requests are scheduled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fastserve.core.output import RequestMetrics
from fastserve.core.request import FinishReason
from fastserve.engine.messages import EngineInfo, EngineStats

PREFIX = "fastserve:"

LATENCY_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

SAME_NAME = (
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries",
    "prefix_cache_hits", "prompt_tokens", "generation_tokens", "request_success",
    "num_preemptions", "time_to_first_token_seconds", "inter_token_latency_seconds",
    "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_prompt_tokens", "request_generation_tokens",
    "cache_config_info",
)  # fmt: skip
# Our name → vLLM's: mostly the same, and the older name of one of them.
VLLM_ALIASES: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in SAME_NAME},
    "inter_token_latency_seconds": (
        "inter_token_latency_seconds",
        "time_per_output_token_seconds",
    ),
}

CACHE_LABELS = {
    "block_size": "block_size",
    "num_device_blocks": "num_device_blocks",
    "num_gpu_blocks": "num_device_blocks",
    "max_model_len": "max_model_len",
    "dtype": "dtype",
    "device": "device",
}


class SnapshotCounter(NamedTuple):
    """A counter that the engine keeps: its name, help, and field of SchedulerStats."""

    name: str
    text: str
    field: str


SNAPSHOT_COUNTERS = (
    SnapshotCounter("num_preemptions", "Times a request lost its KV.", "num_preemptions"),
    SnapshotCounter("demotions", "Moves of a request to a lower level.", "num_demotions"),
    SnapshotCounter("promotions", "Moves of a starved request to level 0.", "num_promotions"),
    SnapshotCounter("recomputed_tokens", "Tokens computed again.", "num_recomputed_tokens"),
    SnapshotCounter("dropped_samples", "Samples behind an end of text.", "num_dropped_samples"),
    SnapshotCounter("engine_steps", "Steps of the engine.", "num_steps"),
    SnapshotCounter("scheduler_stalls", "Plans that made no progress.", "num_stalls"),
    SnapshotCounter("prefix_cache_hits", "Prompt tokens found in the cache.",
                    "num_cached_prompt_tokens"),
)  # fmt: skip


class AliasedRegistry(Collector):
    """Collects a registry with the prefix, and what vLLM has once more under its name."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """Yield every metric under each of its names."""
        for metric in self._registry.collect():
            yield _renamed(metric, PREFIX + metric.name)
            for alias in VLLM_ALIASES.get(metric.name, ()):
                yield _renamed(metric, "vllm:" + alias)


def _renamed(metric: Metric, name: str) -> Metric:
    copy = Metric(name, metric.documentation, metric.type)
    copy.samples = [
        sample._replace(name=name + sample.name.removeprefix(metric.name))
        for sample in metric.samples
        if not sample.name.endswith("_created")  # times of birth that nobody graphs
    ]
    return copy


class EngineMetrics:
    """What is counted, and how the engine's news moves it."""

    def __init__(self, model_name: str) -> None:
        self._names = {"model_name": model_name}
        self._registry = CollectorRegistry(auto_describe=False)
        self._exported = CollectorRegistry(auto_describe=False)
        self._exported.register(AliasedRegistry(self._registry))
        self._last_counts: dict[str, float] = {}
        gauge, counter, histogram = self._gauge, self._counter, self._histogram
        gauge("start_time_seconds", "Unix time of the server's start.").set_to_current_time()
        self._running = gauge("num_requests_running", "Requests that hold KV on the device.")
        self._waiting = gauge("num_requests_waiting", "Requests that hold none.")
        self._usage = gauge("kv_cache_usage_perc", "Share of device KV blocks in use, 0 to 1.")
        self._by_level = gauge("requests_by_level", "Requests in each queue.", "level")
        self._blocks = gauge("kv_blocks", "KV blocks by tier and state.", "tier", "state")
        self._cache_config = gauge(
            "cache_config_info", "Sizes of the KV cache, as labels.", *CACHE_LABELS
        )
        self._restarts = counter("engine_restarts", "Engine processes started after a death.")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens processed.")
        self._generated = counter("generation_tokens", "Tokens generated.")
        self._success = counter("request_success", "Requests that ended.", "finished_reason")
        self._queries = counter("prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self._scheduler_s = counter("scheduler_step_seconds", "Spent in deciding.")
        self._device_s = counter("device_step_seconds", "Spent in steps by the device.")
        self._snapshots = {spec.field: counter(spec.name, spec.text) for spec in SNAPSHOT_COUNTERS}
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.")
        self._itl = histogram("inter_token_latency_seconds", "Between tokens of a request.")
        self._mean_tpot = histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first."
        )
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.")
        self._normalized = histogram(
            "normalized_latency_seconds", "Arrival to last token over output tokens."
        )
        self._queue = histogram("request_queue_time_seconds", "Arrival to first step.")
        self._prompt_sizes = histogram("request_prompt_tokens", "Prompt tokens.", TOKENS)
        self._output_sizes = histogram("request_generation_tokens", "Generated tokens.", TOKENS)
        for reason in FinishReason:  # so that a rate over them never misses its beginning
            self._success.labels(**self._names, finished_reason=reason.value)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        gauge = Gauge(name, text, ("model_name", *labels), registry=self._registry)
        return gauge if labels else gauge.labels(**self._names)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(name, text, ("model_name", *labels), registry=self._registry)
        return counter if labels else counter.labels(**self._names)

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = LATENCY_S) -> Histogram:
        histogram = Histogram(name, text, ("model_name",), registry=self._registry, buckets=buckets)
        return histogram.labels(**self._names)

    def loaded(self, info: EngineInfo) -> None:
        """Publish what the engine measured when it was ready."""
        labels = {label: str(getattr(info, field)) for label, field in CACHE_LABELS.items()}
        self._cache_config.clear()
        self._cache_config.labels(**self._names, **labels).set(1)

    def restarted(self) -> None:
        """Count an engine process started after a death; its counters begin at zero."""
        self._restarts.inc()
        self._last_counts.clear()

    def first_token(self, prompt_tokens: int, ttft_s: float) -> None:
        """See the first token of a request."""
        self._prompt_tokens.inc(prompt_tokens)
        self._ttft.observe(ttft_s)

    def next_tokens(self, num_tokens: int, gap_s: float) -> None:
        """See tokens that came `gap_s` after the previous ones of their request."""
        for _ in range(num_tokens):
            self._itl.observe(gap_s / num_tokens)

    def generated(self, num_tokens: int) -> None:
        """Count output tokens."""
        self._generated.inc(num_tokens)

    def finished(
        self,
        reason: FinishReason,
        prompt_tokens: int,
        output_tokens: int,
        jct_s: float,
        metrics: RequestMetrics | None,
    ) -> None:
        """See the end of a request."""
        names = self._names
        self._success.labels(**names, finished_reason=reason.value).inc()
        if reason in (FinishReason.ABORT, FinishReason.ERROR):
            return
        self._e2e.observe(jct_s)
        self._prompt_sizes.observe(prompt_tokens)
        self._output_sizes.observe(output_tokens)
        if output_tokens:
            self._normalized.observe(jct_s / output_tokens)
        if metrics is None:
            return
        if metrics.first_scheduled is not None:
            self._queue.observe(metrics.first_scheduled - metrics.arrival)
        if metrics.first_token is not None and output_tokens > 1:
            spent = metrics.finished - metrics.first_token
            self._mean_tpot.observe(spent / (output_tokens - 1))

    def snapshot(self, stats: EngineStats) -> None:
        """Take over the engine's own figures."""
        now, names = stats.scheduler, self._names
        self._running.set(now.num_running)
        self._waiting.set(now.num_waiting + now.num_preempted)
        total = max(1, now.device_blocks_total)
        self._usage.set(now.device_blocks_used / total)
        self._by_level.clear()
        for level, count in now.requests_by_level.items():
            self._by_level.labels(**names, level=str(level)).set(count)
        for tier, state, count in (
            ("device", "free", now.device_blocks_free),
            ("device", "cached", now.device_blocks_cached),
            ("device", "used", now.device_blocks_used),
            ("host", "free", now.host_blocks_total - now.host_blocks_used),
            ("host", "used", now.host_blocks_used),
        ):
            self._blocks.labels(**names, tier=tier, state=state).set(count)
        for field, counter in self._snapshots.items():
            self._advance(counter, field, getattr(now, field))
        looked_up = now.num_cached_prompt_tokens + now.num_computed_prompt_tokens
        self._advance(self._queries, "looked_up", looked_up)
        self._advance(self._scheduler_s, "scheduler_s", stats.scheduler_s)
        self._advance(self._device_s, "device_s", stats.device_s)

    def _advance(self, counter: Counter, key: str, value: float) -> None:
        counter.inc(max(0.0, value - self._last_counts.get(key, 0.0)))
        self._last_counts[key] = value

    def render(self) -> tuple[bytes, str]:
        """Return the exposition and its content type."""
        return generate_latest(self._exported), CONTENT_TYPE_LATEST
