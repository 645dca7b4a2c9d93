"""The figures of `bench serve`, worked out by hand."""

from __future__ import annotations

import pytest

from fastserve.bench.serve_config import ServeBenchConfig
from fastserve.bench.serve_report import Run, Sent, details, figures
from fastserve.bench.stream_client import Answer

RUN = Run(
    sent=(
        Sent(10.0, Answer(10.5, [11.0, 11.5, 13.0], 7, 3, "length")),
        Sent(11.0, None, "503: busy"),
        Sent(12.0, Answer(12.0, [12.25], 5, 1, "length")),
    ),
    duration_s=4.0,
    client_cpu_s=0.2,
    slowdowns=(2.0, 4.0),
)


def test_vllms_fields():
    """From the moment of sending; TPOT has no value for one token; ITL is every gap."""
    found = figures(RUN, ServeBenchConfig(metric_percentiles="0,100"))
    assert (found["completed"], found["failed"]) == (2, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (12, 4)
    assert found["request_throughput"] == 0.5
    assert found["output_throughput"] == 1.0
    assert found["total_token_throughput"] == 4.0
    assert (found["p0_ttft_ms"], found["mean_ttft_ms"], found["p100_ttft_ms"]) == (250, 375, 500)
    assert found["std_ttft_ms"] == 125
    assert found["median_tpot_ms"] == 1000  # 2 s over the 2 tokens after the first
    assert (found["mean_itl_ms"], found["p100_itl_ms"]) == (1000, 1500)
    assert found["mean_e2el_ms"] == (2500 + 250) / 2
    assert found["client_cpu_share"] == pytest.approx(0.05)


def test_jobs_count_from_the_moment_they_were_due():
    """JCT 3 s for 3 tokens and 0.25 s for one; slowdown is of what was measured alone."""
    found = figures(RUN, ServeBenchConfig())
    assert found["mean_jct_s"] == (3.0 + 0.25) / 2
    assert found["p50_norm_latency_ms"] == (1000 + 250) / 2
    assert (found["mean_slowdown"], found["p95_slowdown"]) == (3.0, pytest.approx(3.9))


def test_what_was_not_measured_is_null():
    """No answers, nothing alone, or a metric whose percentiles nobody asked for."""
    nothing = figures(Run((Sent(0.0, None, "lost"),), 1.0, 0.0, ()), ServeBenchConfig())
    assert nothing["mean_ttft_ms"] is None
    assert nothing["p99_tpot_ms"] is None
    assert nothing["mean_jct_s"] is None
    assert nothing["p99_slowdown"] is None
    chosen = figures(RUN, ServeBenchConfig(percentile_metrics="ttft"))
    assert "p99_ttft_ms" in chosen
    assert "p99_itl_ms" not in chosen
    assert chosen["mean_itl_ms"] == 1000


def test_details_keep_the_order_of_arrival():
    """One entry a request, lost ones with their error."""
    found = details(RUN)
    assert found["output_lens"] == [3, 0, 1]
    assert found["ttfts"] == [0.5, None, 0.25]
    assert found["itls"] == [[0.5, 1.5], [], []]
    assert found["jcts"] == [3.0, None, 0.25]
    assert found["errors"] == [None, "503: busy", None]
