"""A look at a server: every figure under the name that the metrics give it, rates between two."""

from __future__ import annotations

import dataclasses
import time

import msgspec
import pytest

from fastserve.client.forecast_metrics import WORK_RANGES
from fastserve.client.metrics import EngineMetrics
from fastserve.client.replica_metrics import ReplicaMetrics
from fastserve.core.messages import Forecasts, SchedulerStats
from fastserve.verbs.server_snapshot import Snapshot, rate, read_snapshot
from fastserve.wire.engine_messages import EngineInfo, EngineStats
from fastserve.wire.step_sizes import StepSizes
from tests.core.harness import UNIT_COST

STATS = SchedulerStats(
    num_running=3,
    num_waiting=4,
    num_preempted=1,
    requests_by_level={0: 2, 3: 5, 11: 1},
    device_blocks_total=100,
    device_blocks_free=30,
    device_blocks_cached=20,
    device_blocks_used=50,
    host_blocks_total=0,
    host_blocks_free=0,
    host_blocks_cached=0,
    host_blocks_moving=0,
    host_blocks_used=0,
    device_blocks_moving=0,
    num_swaps=0,
    num_swapped_out_blocks=0,
    num_swapped_in_blocks=0,
    num_saved_blocks=0,
    num_fetched_blocks=0,
    num_clean_blocks=0,
    num_failed_copies=0,
    copy_wait_s=0.0,
    num_steps=10,
    num_preemptions=6,
    num_demotions=7,
    num_promotions=8,
    num_recomputed_tokens=0,
    num_computed_prompt_tokens=0,
    num_cached_prompt_tokens=0,
    num_dropped_samples=0,
    num_stalls=0,
    forecasts=None,
    requests_by_work=(),
)


FORECASTS = Forecasts(
    num_by_decile=(20,) * 10,
    predicted_tokens=2500.0,
    answered_tokens=2000,
    work_s=1234.5,
    mean_work_s=8.25,
)
WORK = (0, 5, 2, 0, 1)

INFO = EngineInfo(
    model="demo",
    max_model_len=2048,
    max_request_tokens=1600,
    vocab_size=9,
    block_size=16,
    num_device_blocks=100,
    num_host_blocks=0,
    block_bytes=1000,
    eos_token_ids=frozenset(),
    dtype="float32",
    device="cpu",
    cost_model=UNIT_COST,
    max_num_seqs=8,
    enable_prefix_caching=True,
    sampling_defaults={},
)


WITH_HOST = msgspec.structs.replace(INFO, num_host_blocks=400, block_bytes=1_000_000)


def exposition(num_generated=0, *, is_loaded=True, info=INFO, **changes):
    """Return what /metrics of an engine in this state says."""
    metrics = EngineMetrics("demo")
    tell(metrics, num_generated, is_loaded=is_loaded, info=info, **changes)
    return metrics.render()[0].decode()


def replica_exposition(generated=(0, 0)):
    """Return what /metrics of three engines says: two that have loaded, one of which serves."""
    engines = [EngineMetrics("demo", replica) for replica in range(3)]
    engines[0].restarted()
    for replica, num_generated in enumerate(generated):
        tell(engines[replica], num_generated, num_running=3 + replica)
    metrics = ReplicaMetrics("demo", engines, lambda: 1)
    return metrics.render()[0].decode()


def tell(metrics, num_generated=0, *, is_loaded=True, info=INFO, **changes):
    """Let metrics hear of an engine in this state."""
    if is_loaded:
        metrics.loaded(info)
    metrics.snapshot(
        EngineStats(
            scheduler=dataclasses.replace(STATS, **changes),
            num_requests=8,
            steps_by_tokens=StepSizes().counts,
            step_tokens=0,
            scheduler_s=0.5,
            device_s=1.0,
            at=0.0,
        )
    )
    metrics.generated(num_generated)


def test_snapshot_of_real_metrics():
    """Every figure is found under the name that the metrics module gives it."""
    now = read_snapshot(exposition(num_generated=99), at=1.0)
    assert (now.running, now.waiting) == (3, 5)  # who was preempted waits
    assert (now.model_name, now.is_loaded) == ("demo", True)
    assert now.started_at == pytest.approx(time.time(), abs=60.0)
    assert now.by_level == {0: 2, 3: 5, 11: 1}
    assert now.blocks["device", "used"] == 50
    assert sum(count for (tier, _), count in now.blocks.items() if tier == "device") == 100
    assert now.totals["generation_tokens_total"] == 99
    for name, value in (("num_preemptions", 6), ("demotions", 7), ("engine_steps", 10)):
        assert now.totals[f"{name}_total"] == value
    assert "prompt_tokens_total" in now.totals
    assert "scheduler_step_seconds_total" in now.totals
    assert (now.work_s, now.mean_work_s) == (None, None)
    assert not now.by_work
    assert not now.by_decile


def test_figures_of_several_engines_are_summed():
    """Blocks, levels and totals alike; each engine's own are beside them."""
    now = read_snapshot(replica_exposition((99, 1)), at=1.0)
    assert (now.running, now.waiting, now.num_serving) == (7, 10, 1)
    assert now.by_level == {0: 4, 3: 10, 11: 2}
    assert now.blocks["device", "used"] == 100
    assert now.totals["generation_tokens_total"] == 100
    assert now.started_at == pytest.approx(time.time(), abs=60.0)
    shown = [(r.running, r.generated, r.restarts, r.is_loaded) for r in now.replicas.values()]
    assert shown == [(3, 99.0, 1, True), (4, 1.0, 0, True), (0, 0.0, 0, False)]


def test_what_a_policy_predicts_is_found():
    """Work by its ranges, least first, and answers by decile."""
    now = read_snapshot(exposition(forecasts=FORECASTS, requests_by_work=WORK), at=1.0)
    assert (now.work_s, now.mean_work_s) == (1234.5, 8.25)
    assert [*now.by_work.items()] == list(zip(WORK_RANGES, WORK, strict=True))
    assert now.by_decile == dict.fromkeys(range(10), 20)
    assert now.totals["predicted_output_tokens_total"] == 2500.0
    assert now.totals["answered_tokens_total"] == 2000


def test_rates_are_differences():
    """Tokens a second are those between two looks; one look tells no rate."""
    before = Snapshot(at=1.0, totals={"x_total": 10.0})
    now = Snapshot(at=3.0, totals={"x_total": 40.0})
    assert rate(before, now, "x_total") == 15.0
    assert rate(None, now, "x_total") is None
    assert rate(now, now, "x_total") is None
