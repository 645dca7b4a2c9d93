"""Metrics of predictions: counts that grow, work as it is, nothing where nothing is predicted."""

from __future__ import annotations

import dataclasses

from fastserve.client.forecast_metrics import WORK_RANGES
from fastserve.client.metrics import EngineMetrics
from fastserve.core.messages import WORK_BOUNDS_S, Forecasts
from tests.client.test_metrics import read, snapshot, value
from tests.wire.test_engine_messages import STATS

DECILES = "fastserve:answers_by_predicted_decile_total"


def forecasts() -> Forecasts:
    """Return those of the snapshot."""
    assert STATS.forecasts is not None
    return STATS.forecasts


def test_a_policy_that_predicts_nothing_exports_nothing() -> None:
    """A dashboard is not to draw zeros that nobody measured."""
    metrics = EngineMetrics("demo")
    metrics.snapshot(snapshot(forecasts=None, requests_by_work=()))
    assert not [name for name, _ in read(metrics) if "predicted" in name or "expected" in name]


def test_deciles_are_counted_from_the_first_on_whatever_the_engine() -> None:
    """All ten are there from the beginning; a snapshot seen twice counts once, a restart adds."""
    metrics = EngineMetrics("demo")
    metrics.snapshot(snapshot())
    metrics.snapshot(snapshot())
    counts = [value(metrics, DECILES, decile=str(decile)) for decile in range(10)]
    assert counts == list(forecasts().num_by_decile)
    assert value(metrics, "fastserve:predicted_output_tokens_total") == 99.5
    assert value(metrics, "fastserve:answered_tokens_total") == 90
    metrics.restarted()
    metrics.snapshot(snapshot())
    assert value(metrics, DECILES, decile="9") == 8
    assert value(metrics, "fastserve:answered_tokens_total") == 180


def test_work_is_that_of_the_last_snapshot() -> None:
    """Gauges go down too."""
    metrics = EngineMetrics("demo")
    metrics.snapshot(snapshot())
    assert value(metrics, "fastserve:expected_work_seconds") == 12.5
    after = dataclasses.replace(forecasts(), work_s=0.0, mean_work_s=2.0)
    metrics.snapshot(snapshot(forecasts=after, requests_by_work=[1, 0, 0, 0, 0]))
    assert value(metrics, "fastserve:expected_work_seconds") == 0.0
    assert value(metrics, "fastserve:mean_expected_work_seconds") == 2.0
    by_work = [
        value(metrics, "fastserve:requests_by_expected_work", seconds=seconds)
        for seconds in WORK_RANGES
    ]
    assert by_work == [1, 0, 0, 0, 0]


def test_ranges_of_work_meet_and_the_last_is_open() -> None:
    """A label says where its bucket begins and ends."""
    assert len(WORK_RANGES) == len(WORK_BOUNDS_S) + 1
    assert (WORK_RANGES[0], WORK_RANGES[1], WORK_RANGES[-1]) == ("0-0.01", "0.01-0.1", "10+")
