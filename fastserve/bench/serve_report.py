"""The figures of `bench serve`: vllm bench serve's fields, and those of jobs.

Rules: plain arithmetic. TTFT, TPOT, ITL and E2EL are vLLM's: from the moment a request was sent;
TPOT leaves out the first token, ITL is the gap between two pieces of an answer. JCT counts from
the moment the request was due (and had its place, under --max-concurrency), so that a client that
falls behind cannot flatter the server; normalized latency is JCT / output tokens; slowdown is JCT /
the JCT of a request of the same lengths alone on the server, null where that was not measured.
Must not know: HTTP, files, how answers came about.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fastserve.bench.serve_config import METRICS, ServeBenchConfig
from fastserve.bench.stream_client import Answer
from fastserve.sim.measures import percentile


@dataclass(frozen=True, slots=True)
class Sent:
    """One request of the run: when it was due (time.perf_counter), and what became of it."""

    due: float
    answer: Answer | None
    error: str | None = None

    @property
    def jct(self) -> float:
        """Seconds from the moment it was due to its last token."""
        assert self.answer is not None
        return self.answer.piece_times[-1] - self.due


@dataclass(frozen=True, slots=True)
class Run:
    """What a run was and what came back, in order of arrival."""

    sent: Sequence[Sent]
    duration_s: float
    client_cpu_s: float
    slowdowns: Sequence[float]  # of the requests that were also measured alone


def figures(run: Run, config: ServeBenchConfig) -> dict[str, Any]:
    """Return the result without what names the run."""
    sent = [one for one in run.sent if one.answer is not None]
    answers = [one.answer for one in sent if one.answer is not None]
    inputs = sum(answer.prompt_tokens for answer in answers)
    outputs = sum(answer.output_tokens for answer in answers)
    seconds = run.duration_s
    result: dict[str, Any] = {
        "duration": seconds,
        "completed": len(answers),
        "failed": len(run.sent) - len(answers),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(answers) / seconds,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "client_cpu_share": run.client_cpu_s / seconds,
    }
    for name, values in latencies(answers).items():
        is_chosen = name in config.chosen_metrics()
        result.update(spread(f"{name}_ms", values, config.percentiles() if is_chosen else ()))
    norm_ms = [1e3 * one.jct / one.answer.output_tokens for one in sent if one.answer]
    for name, figures_of in (
        ("norm_latency_ms", norm_ms),
        ("jct_s", [one.jct for one in sent]),
        ("slowdown", run.slowdowns),
    ):
        result.update(summary(name, figures_of, config.percentiles()))
    return result


def latencies(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """Return the values of each of vLLM's metrics, in milliseconds."""
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    for answer in answers:
        times = answer.piece_times
        found["ttft"].append(1e3 * (times[0] - answer.sent_at))
        found["e2el"].append(1e3 * (times[-1] - answer.sent_at))
        found["itl"] += [1e3 * (later - sooner) for sooner, later in pairwise(times)]
        if answer.output_tokens > 1:
            found["tpot"].append(1e3 * (times[-1] - times[0]) / (answer.output_tokens - 1))
    return found


def spread(name: str, values: Sequence[float], percents: Sequence[float]) -> dict[str, Any]:
    """Return mean, median, deviation and percentiles under vLLM's names; null of nothing."""
    return {
        f"mean_{name}": statistics.fmean(values) if values else None,
        f"median_{name}": statistics.median(values) if values else None,
        f"std_{name}": statistics.pstdev(values) if values else None,
        **{f"p{p:g}_{name}": percentile(values, p) if values else None for p in percents},
    }


def summary(name: str, values: Sequence[float], percents: Sequence[float]) -> dict[str, Any]:
    """Return mean, P50, P95, P99 and the percentiles asked for; null of nothing."""
    wanted = sorted({50.0, 95.0, 99.0, *percents})
    return {
        f"mean_{name}": statistics.fmean(values) if values else None,
        **{f"p{p:g}_{name}": percentile(values, p) if values else None for p in wanted},
    }


def details(run: Run) -> dict[str, Any]:
    """Return every request's lengths, times in seconds, and errors."""
    answers = [one.answer or Answer(0.0) for one in run.sent]
    return {
        "input_lens": [answer.prompt_tokens for answer in answers],
        "output_lens": [answer.output_tokens for answer in answers],
        "ttfts": [a.piece_times[0] - a.sent_at if a.piece_times else None for a in answers],
        "itls": [[b - a for a, b in pairwise(answer.piece_times)] for answer in answers],
        "jcts": [one.jct if one.answer else None for one in run.sent],
        "errors": [one.error for one in run.sent],
    }
