"""Reports: the statistics, the yardstick, the keys that others rely on."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from fastserve.sim.measures import summary
from fastserve.sim.report import make_report
from fastserve.sim.simulator import simulate
from tests.sim.machines import MACHINE, SWAPPING, make_workload, small_config

KEYS = [
    "policy", "config", "requests", "completed", "dropped", "jct_s", "normalized_latency_s",
    "ttft_s", "tpot_s", "max_gap_s", "slowdown", "breakdown_s", "preemptions", "swap_in_bytes",
    "swap_out_bytes", "fetched_bytes", "saved_bytes", "clean_bytes", "wasted_bytes",
    "recomputed_tokens", "cached_tokens", "copy_wait_s", "peak_device_blocks",
    "peak_host_blocks", "peak_live_blocks", "peak_live_requests", "busy_s", "makespan_s", "wall_s",
    "journal_sha256",
]  # fmt: skip
PARTS = ["mean", "p50", "p95", "p99", "max"]


def report(workload, **changes):
    """Simulate and report."""
    config = small_config(**changes)
    outcome = simulate(config, MACHINE, workload)
    return make_report(
        outcome, workload, config, MACHINE,
        settings={"model": "m"}, wall_s=1.0, journal_sha256="ab",
    )  # fmt: skip


def test_summary_of_known_values():
    """Percentiles interpolate; NaN do not count; nothing has no mean."""
    assert summary(np.arange(1.0, 102.0)) == {
        "mean": 51.0, "p50": 51.0, "p95": 96.0, "p99": 100.0, "max": 101.0,
    }  # fmt: skip
    assert summary(np.array([np.nan, 3.0]))["mean"] == 3.0
    assert summary(np.array([np.nan])) == dict.fromkeys(PARTS)


def test_a_report_has_exactly_the_keys_promised():
    """In this order, as plain JSON."""
    got = report(make_workload((0.0, 8, 4), (0.5, 4, 2)))
    assert list(got) == KEYS
    for name in ("jct_s", "normalized_latency_s", "ttft_s", "tpot_s", "max_gap_s", "slowdown"):
        assert list(got[name]) == PARTS
    assert list(got["breakdown_s"]) == ["queue", "swap", "execute"]
    assert json.loads(json.dumps(got)) == got


def test_figures_of_a_lone_request_are_consistent():
    """JCT = TTFT + decodes; slowdown 1; all of it is execution."""
    got = report(make_workload((3.0, 8, 5)))
    jct_s, ttft_s, tpot_s = (got[name]["mean"] for name in ("jct_s", "ttft_s", "tpot_s"))
    assert jct_s == pytest.approx(ttft_s + 4 * tpot_s)
    assert got["normalized_latency_s"]["max"] == pytest.approx(jct_s / 5)
    assert got["slowdown"]["mean"] == pytest.approx(1.0)
    assert got["breakdown_s"] == {"queue": 0.0, "swap": 0.0, "execute": pytest.approx(jct_s)}
    assert got["makespan_s"] == pytest.approx(got["busy_s"]) == pytest.approx(jct_s)


def test_queue_and_execution_add_up():
    """With a batch of one the second request queues, and the parts make its JCT."""
    got = report(make_workload((0.0, 8, 4), (0.0, 8, 4)), max_num_seqs=1)
    parts = got["breakdown_s"]
    assert parts["queue"] > 0
    assert sum(parts.values()) == pytest.approx(got["jct_s"]["mean"])
    assert got["slowdown"]["max"] == pytest.approx(2.0)


def test_moved_kv_is_told_in_bytes_and_seconds():
    """Both ways, by why; what a request waits for its KV is no part of its queueing."""
    rows = [(0.3 * index, 20 + 7 * index % 30, 10 + 11 * index % 40) for index in range(20)]
    config = small_config(
        scheduling_policy="skip-join-mlfq", preemption_mode="proactive", starvation_limit=5.0
    )
    machine = replace(SWAPPING, num_host_blocks=1000)
    outcome = simulate(config, machine, make_workload(*rows))
    got = make_report(
        outcome, make_workload(*rows), config, machine,
        settings={}, wall_s=1.0, journal_sha256=None,
    )  # fmt: skip
    stats, parts = outcome.stats, got["breakdown_s"]
    assert got["swap_in_bytes"] == 1000 * (stats.num_swapped_in_blocks + stats.num_fetched_blocks)
    assert got["swap_out_bytes"] == 1000 * (stats.num_swapped_out_blocks + stats.num_saved_blocks)
    assert got["saved_bytes"] == 1000 * stats.num_saved_blocks > 0
    assert got["swap_in_bytes"] > 0
    assert got["copy_wait_s"] == stats.copy_wait_s
    assert parts["swap"] == pytest.approx(outcome.swap_s.mean()) != 0.0
    assert sum(parts.values()) == pytest.approx(got["jct_s"]["mean"])
    assert got["peak_live_blocks"] > got["peak_device_blocks"]


def test_sources_are_reported_apart():
    """Their counts make the whole, and so do their means."""
    workload = make_workload((0.0, 8, 4), (9.0, 8, 4), (9.5, 80, 40), source=("s", "s", "l"))
    got = report(workload)
    parts = got["by_source"]
    assert list(got) == [*KEYS, "by_source"]
    assert {name: part["completed"] for name, part in parts.items()} == {"l": 1, "s": 2}
    weighted = (2 * parts["s"]["jct_s"]["mean"] + parts["l"]["jct_s"]["mean"]) / 3
    assert weighted == pytest.approx(got["jct_s"]["mean"])


def test_clients_are_reported_apart_where_there_is_no_source():
    """A source says more of a row than who asked."""
    workload = make_workload((0.0, 8, 4), (9.0, 8, 4), client=("13", "2"))
    assert set(report(workload)["by_source"]) == {"13", "2"}
    assert set(report(replace(workload, source=("s", "s")))["by_source"]) == {"s"}


def test_dropped_rows_are_requests_that_were_not_completed():
    """requests = completed + dropped."""
    workload = make_workload((0.0, 8, 4), (0.0, 800, 4)).fitted(128, "drop")
    got = report(workload)
    assert (got["requests"], got["completed"], got["dropped"]) == (2, 1, 1)
