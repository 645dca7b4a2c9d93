"""Prometheus metrics of the API process, fed with what the engine reports.

Rules: a registry of one's own, nothing global; every name is exported with the prefix `fastserve:`,
and those that vLLM has too are repeated with `vllm:`, so that its dashboards work: one table says
which. A text says what is counted, and when. Snapshots are set, news is counted. A restarted engine
counts from zero; these totals go on. Must not know: torch, HTTP, how requests are scheduled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from fastserve.client.exposition import AliasedRegistry, CountedHistogram
from fastserve.client.forecast_metrics import ForecastMetrics
from fastserve.client.swap_metrics import SwapMetrics
from fastserve.core.messages import RequestMetrics
from fastserve.core.request import FinishReason, SamplingParams
from fastserve.wire.engine_messages import EngineInfo, EngineStats
from fastserve.wire.step_sizes import STEP_TOKENS

PREFIX = "fastserve:"
VLLM_PREFIX = "vllm:"

LATENCY_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

CHOICES = (1, 2, 5, 10, 20)

SAME_NAMES = (
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries",
    "prefix_cache_hits", "prompt_tokens", "generation_tokens", "request_success",
    "num_preemptions", "time_to_first_token_seconds", "inter_token_latency_seconds",
    "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
    "request_inference_time_seconds", "request_prompt_tokens", "request_generation_tokens",
    "request_params_max_tokens", "request_params_n", "iteration_tokens_total", "cache_config_info",
)  # fmt: skip
# vLLM's name → ours: mostly the same, and the names that its older versions used.
VLLM_ALIASES: Mapping[str, str] = {
    **{name: name for name in SAME_NAMES},
    "time_per_output_token_seconds": "inter_token_latency_seconds",
    "gpu_cache_usage_perc": "kv_cache_usage_perc",
    "gpu_prefix_cache_queries": "prefix_cache_queries",
    "gpu_prefix_cache_hits": "prefix_cache_hits",
}

CACHE_LABELS = {
    "block_size": "block_size",
    "num_device_blocks": "num_device_blocks",
    "num_gpu_blocks": "num_device_blocks",
    "num_host_blocks": "num_host_blocks",
    "num_cpu_blocks": "num_host_blocks",
    "block_bytes": "block_bytes",
    "max_model_len": "max_model_len",
    "dtype": "dtype",
    "device": "device",
    "tensor_parallel_size": "tensor_parallel_size",
    "pipeline_parallel_size": "pipeline_parallel_size",
}


class SnapshotCounter(NamedTuple):
    """A counter that the engine keeps: its name, help, and field of SchedulerStats."""

    name: str
    text: str
    field: str


SNAPSHOT_COUNTERS = (
    SnapshotCounter(
        "num_preemptions",
        "Times a running request that could go on was left out of a plan; it may keep its KV.",
        "num_preemptions",
    ),
    SnapshotCounter("demotions", "Moves of a request to a lower level.", "num_demotions"),
    SnapshotCounter("promotions", "Moves of a starving request to level 0.", "num_promotions"),
    SnapshotCounter(
        "recomputed_tokens",
        "Tokens whose KV was computed again after it was lost.",
        "num_recomputed_tokens",
    ),
    SnapshotCounter(
        "dropped_samples",
        "Sampled tokens that no answer has: behind a stop, or of a request that had ended.",
        "num_dropped_samples",
    ),
    SnapshotCounter("engine_steps", "Steps that were planned.", "num_steps"),
    SnapshotCounter(
        "scheduler_stalls",
        "Times nothing made progress, and the oldest request was let run alone.",
        "num_stalls",
    ),
    SnapshotCounter(
        "prefix_cache_hits",
        "Prompt tokens found in the prefix cache when their request first got KV.",
        "num_cached_prompt_tokens",
    ),
)


class EngineMetrics:
    """What is counted of one engine, and how its news moves it.

    `replica` is its number among the copies of a model, as vLLM numbers them: the label `engine`.
    """

    def __init__(self, model_name: str, replica: int = 0) -> None:
        self._names = {"engine": str(replica), "model_name": model_name}
        self.registry = CollectorRegistry(auto_describe=False)
        self._last_counts: dict[str, float] = {}
        self._forecasts: ForecastMetrics | None = None  # until a policy makes some
        self._swaps: SwapMetrics | None = None  # until there is a host tier
        self._declare_gauges()
        self._declare_counters()
        self._declare_histograms()
        for reason in FinishReason:  # so that a rate over them never misses its beginning
            self._success.labels(**self._names, finished_reason=reason.value)

    def _declare_gauges(self) -> None:
        gauge = self._gauge
        gauge("start_time_seconds", "Unix time of the server's start.").set_to_current_time()
        self._running = gauge(
            "num_requests_running", "Requests in the latest plan, or with a step still under way."
        )
        self._waiting = gauge(
            "num_requests_waiting", "Requests that are not running: not begun yet, or preempted."
        )
        self._usage = gauge(
            "kv_cache_usage_perc", "Share of the device's KV blocks that requests hold, 0 to 1."
        )
        self._by_level = gauge("requests_by_level", "Requests at each level.", "level")
        self._blocks = gauge("kv_blocks", "KV blocks by tier and state.", "tier", "state")
        self._cache_config = gauge(
            "cache_config_info", "Sizes of the KV cache, as labels.", *CACHE_LABELS
        )

    def _declare_counters(self) -> None:
        counter = self._counter
        self._restarts = counter("engine_restarts", "Engine processes started after a death.")
        self._resumed = counter(
            "requests_resumed", "Requests that this engine goes on with, after one with them died."
        )
        self._prompt_tokens = counter(
            "prompt_tokens", "Prompt tokens of requests that came to their first token."
        )
        self._generated = counter("generation_tokens", "Output tokens that the engine reported.")
        self._success = counter(
            "request_success",
            "Requests that ended, by reason; aborted and failed ones too.",
            "finished_reason",
        )
        self._queries = counter(
            "prefix_cache_queries",
            "Prompt tokens found in the prefix cache or computed; computed again: counted again.",
        )
        self._scheduler_s = counter("scheduler_step_seconds", "Seconds spent in deciding.")
        self._device_s = counter("device_step_seconds", "Seconds that steps took the device.")
        self._snapshots = {spec.field: counter(spec.name, spec.text) for spec in SNAPSHOT_COUNTERS}

    def _declare_histograms(self) -> None:
        histogram = self._histogram
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.")
        self._itl = histogram(
            "inter_token_latency_seconds",
            "Between tokens of a request; tokens that came together share the gap.",
        )
        self._mean_tpot = histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first."
        )
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to end.")
        self._normalized = histogram(
            "normalized_latency_seconds", "Arrival to end, over output tokens."
        )
        self._queue = histogram("request_queue_time_seconds", "Arrival to first step.")
        self._prefill = histogram(
            "request_prefill_time_seconds", "First step to first token, pauses included."
        )
        self._decode = histogram(
            "request_decode_time_seconds", "First token to end, pauses included."
        )
        self._inference = histogram(
            "request_inference_time_seconds", "First step to end, pauses included."
        )
        self._prompt_sizes = histogram("request_prompt_tokens", "Prompt tokens.", TOKENS)
        self._output_sizes = histogram("request_generation_tokens", "Output tokens.", TOKENS)
        self._max_tokens = histogram(
            "request_params_max_tokens", "Most output tokens that a request might have.", TOKENS
        )
        self._n = histogram("request_params_n", "Choices asked for, once a prompt.", CHOICES)
        self._step_tokens = CountedHistogram(
            "iteration_tokens_total", "Tokens computed in a step.", STEP_TOKENS, self._names
        )
        self.registry.register(self._step_tokens)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        gauge = Gauge(name, text, (*self._names, *labels), registry=self.registry)
        return gauge if labels else gauge.labels(**self._names)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(name, text, (*self._names, *labels), registry=self.registry)
        return counter if labels else counter.labels(**self._names)

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = LATENCY_S) -> Histogram:
        histogram = Histogram(
            name, text, tuple(self._names), registry=self.registry, buckets=buckets
        )
        return histogram.labels(**self._names)

    def loaded(self, info: EngineInfo) -> None:
        """Publish what the engine measured when it was ready."""
        labels = {label: str(getattr(info, field)) for label, field in CACHE_LABELS.items()}
        self._cache_config.clear()
        self._cache_config.labels(**self._names, **labels).set(1)
        if info.num_host_blocks and self._swaps is None:
            self._swaps = SwapMetrics(self.registry, self._names, info.block_bytes)

    def restarted(self) -> None:
        """Count an engine process started after a death; its counters begin at zero."""
        self._restarts.inc()
        self._last_counts.clear()

    def resumed(self) -> None:
        """Count a request that goes on in this engine, whose engine before it died."""
        self._resumed.inc()

    def asked(self, n: int) -> None:
        """See a prompt that `n` choices are wanted of."""
        self._n.observe(n)

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
        params: SamplingParams,
    ) -> None:
        """See the end of a request; only those that were served to it have latencies and sizes."""
        names = self._names
        self._success.labels(**names, finished_reason=reason.value).inc()
        if reason in (FinishReason.ABORT, FinishReason.ERROR):
            return
        self._e2e.observe(jct_s)
        self._prompt_sizes.observe(prompt_tokens)
        self._output_sizes.observe(output_tokens)
        if params.max_tokens is not None:
            self._max_tokens.observe(params.max_tokens)
        if output_tokens:
            self._normalized.observe(jct_s / output_tokens)
        if metrics is None:
            return
        begun, first = metrics.first_scheduled, metrics.first_token
        if begun is not None:
            self._queue.observe(begun - metrics.arrival)
            self._inference.observe(metrics.finished - begun)
        if begun is not None and first is not None:
            self._prefill.observe(first - begun)
        if first is not None:
            self._decode.observe(metrics.finished - first)
            if output_tokens > 1:
                self._mean_tpot.observe((metrics.finished - first) / (output_tokens - 1))

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
            ("device", "moving", now.device_blocks_moving),
            ("device", "used", now.device_blocks_used),
            ("host", "free", now.host_blocks_free),
            ("host", "cached", now.host_blocks_cached),
            ("host", "moving", now.host_blocks_moving),
            ("host", "used", now.host_blocks_used),
        ):
            self._blocks.labels(**names, tier=tier, state=state).set(count)
        for field, counter in self._snapshots.items():
            self._advance(counter, field, getattr(now, field))
        looked_up = now.num_cached_prompt_tokens + now.num_computed_prompt_tokens
        self._advance(self._queries, "looked_up", looked_up)
        self._advance(self._scheduler_s, "scheduler_s", stats.scheduler_s)
        self._advance(self._device_s, "device_s", stats.device_s)
        in_buckets = [
            self._gained(f"steps_{i}", count) for i, count in enumerate(stats.steps_by_tokens)
        ]
        self._step_tokens.inc(in_buckets, self._gained("step_tokens", stats.step_tokens))
        if self._swaps is not None:
            self._swaps.snapshot(now, self._gained)
        if now.forecasts is not None:
            if self._forecasts is None:
                self._forecasts = ForecastMetrics(self.registry, names)
            self._forecasts.snapshot(now.forecasts, now.requests_by_work, self._gained)

    def _advance(self, counter: Counter, key: str, value: float) -> None:
        counter.inc(self._gained(key, value))

    def _gained(self, key: str, value: float) -> float:
        """Return by how much one of the engine's counts has grown since the last snapshot."""
        gain = max(0.0, value - self._last_counts.get(key, 0.0))
        self._last_counts[key] = value
        return gain

    def render(self) -> tuple[bytes, str]:
        """Return the exposition and its content type."""
        return render((self.registry,))


def render(registries: Sequence[CollectorRegistry]) -> tuple[bytes, str]:
    """Return the exposition of registries, under every name that a metric has, and its type."""
    exported = CollectorRegistry(auto_describe=False)
    exported.register(AliasedRegistry(registries, PREFIX, VLLM_PREFIX, VLLM_ALIASES))
    return generate_latest(exported), CONTENT_TYPE_LATEST
