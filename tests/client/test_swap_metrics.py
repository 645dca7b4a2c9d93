"""Metrics of KV that moves: bytes out of blocks, each under its direction and its reason."""

from __future__ import annotations

import msgspec
import pytest

from fastserve.client.metrics import EngineMetrics
from tests.client.test_metrics import read, snapshot, value
from tests.wire.test_engine_messages import INFO

WITH_HOST = msgspec.structs.replace(INFO, num_host_blocks=9, block_bytes=1000)


@pytest.fixture
def metrics() -> EngineMetrics:
    """Return the metrics of an engine that has a host tier."""
    metrics = EngineMetrics("demo")
    metrics.loaded(WITH_HOST)
    return metrics


def test_blocks_are_exported_as_bytes(metrics: EngineMetrics) -> None:
    """Each of the engine's counts has a sample of its own: none is mistaken for another."""
    metrics.snapshot(
        snapshot(
            num_swapped_out_blocks=1,
            num_saved_blocks=2,
            num_swapped_in_blocks=3,
            num_fetched_blocks=4,
            num_clean_blocks=5,
            num_swaps=6,
            num_failed_copies=7,
            copy_wait_s=0.25,
        )
    )
    for name, reason, expected in (
        ("swap_out_bytes", "demand", 1000),
        ("swap_out_bytes", "ahead", 2000),
        ("swap_in_bytes", "demand", 3000),
        ("swap_in_bytes", "ahead", 4000),
    ):
        assert value(metrics, f"fastserve:{name}_total", reason=reason) == expected
    for name, figure in (
        ("swap_clean_bytes", 5000),
        ("swaps", 6),
        ("failed_copies", 7),
        ("copy_wait_seconds", 0.25),
    ):
        assert value(metrics, f"fastserve:{name}_total") == figure


def test_totals_go_on_over_a_restart(metrics: EngineMetrics) -> None:
    """A new engine counts from zero and says anew what a block is, the totals do not."""
    metrics.snapshot(snapshot(num_saved_blocks=5))
    metrics.restarted()
    metrics.loaded(WITH_HOST)
    metrics.snapshot(snapshot(num_saved_blocks=2))
    assert value(metrics, "fastserve:swap_out_bytes_total", reason="ahead") == 7000


def test_without_a_host_tier_there_are_none() -> None:
    """No graph shows a zero that means nothing."""
    metrics = EngineMetrics("demo")
    metrics.loaded(msgspec.structs.replace(INFO, num_host_blocks=0))
    metrics.snapshot(snapshot())
    assert not [name for name, _ in read(metrics) if "swap" in name or "cop" in name]
