"""Turns the outcome of a run into the figures that people compare.

Rules: every latency counts from arrival; a request is compared with the same request alone on the
same machine; bytes of KV are those of all devices together. Must not know: how the run was made,
where the report goes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastserve.core.messages import SchedulerStats
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.measures import Times, summary
from fastserve.sim.simulator import Machine, Outcome
from fastserve.sim.workload import Floats, Workload


def alone_s(config: SchedulerConfig, machine: Machine, workload: Workload) -> Floats:
    """Return the JCT of each row with the machine to itself and nothing cached."""
    costs, overhead = machine.cost_model, machine.overhead
    chunk = -(-config.max_num_batched_tokens // config.num_slots)
    if not config.enable_chunked_prefill:
        chunk = config.max_model_len
    per_step_s = overhead.fixed_s + overhead.per_seq_s
    alone: list[float] = []
    rows = zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True)
    for prompt, output in rows:
        seconds = sum(
            costs.iteration_s(min(chunk, prompt - start), start)
            for start in range(0, prompt, chunk)
        )
        decodes = output - 1
        if decodes:
            # A decode's time is linear in its context: the mean is that of the first and last.
            ends_s = costs.iteration_s(1, prompt) + costs.iteration_s(1, prompt + decodes - 1)
            seconds += decodes * ends_s / 2
        alone.append(seconds + per_step_s * (-(-prompt // chunk) + decodes))
    return np.array(alone)


def latencies(outcome: Outcome, workload: Workload, alone: Floats) -> dict[str, Floats]:
    """Return the figures of each row by the names of the report."""
    times = Times(
        arrived_at=outcome.arrived_at,
        first_token_at=outcome.first_token_at,
        finished_at=outcome.finished_at,
        max_gap_s=outcome.max_gap_s,
        output_tokens=workload.output_tokens,
    )
    by_name = times.latencies()
    return {**by_name, "slowdown": by_name["jct_s"] / alone}


def make_report(
    outcome: Outcome,
    workload: Workload,
    config: SchedulerConfig,
    machine: Machine,
    *,
    settings: Mapping[str, Any],
    wall_s: float,
    journal_sha256: str | None,
) -> dict[str, Any]:
    """Return the JSON object of one run; `settings` say how it was asked for."""
    alone = alone_s(config, machine, workload)
    by_name = latencies(outcome, workload, alone)
    swap_s = float(outcome.swap_s.mean())
    queue_s = float(outcome.queue_s.mean())  # which swapping is a part of
    report: dict[str, Any] = {
        "policy": config.scheduling_policy,
        "config": dict(settings),
        "requests": len(workload) + workload.num_dropped,
        "completed": len(workload),
        "dropped": workload.num_dropped,
        **{name: summary(values) for name, values in by_name.items()},
        "breakdown_s": {
            "queue": queue_s - swap_s,
            "swap": swap_s,
            "execute": float(by_name["jct_s"].mean()) - queue_s,
        },
        "preemptions": outcome.stats.num_preemptions,
        **moved_bytes(outcome.stats, machine.block_bytes),
        "recomputed_tokens": outcome.stats.num_recomputed_tokens,
        "cached_tokens": outcome.stats.num_cached_prompt_tokens,
        "copy_wait_s": outcome.stats.copy_wait_s,
        **{f"peak_{name}": count for name, count in dataclasses.asdict(outcome.peaks).items()},
        "busy_s": outcome.busy_s,
        "makespan_s": float(outcome.finished_at.max() - outcome.arrived_at.min()),
        "wall_s": wall_s,
        "journal_sha256": journal_sha256,
    }
    source = workload.source or workload.client or workload.tenant
    if source is not None:
        report["by_source"] = by_source(by_name, source)
    return report


def moved_bytes(stats: SchedulerStats, block_bytes: int) -> dict[str, int]:
    """Return the bytes of KV that crossed the link each way, and why.

    `saved` are the part of `swap_out` that was copied ahead of need, `fetched` that of `swap_in`.
    `clean` lost its place on the device without a copy; what was saved beyond that is `wasted`: at
    least so much was copied for nothing.
    """
    wasted = max(stats.num_saved_blocks - stats.num_clean_blocks, 0)
    counts = {
        "swap_in": stats.num_swapped_in_blocks + stats.num_fetched_blocks,
        "swap_out": stats.num_swapped_out_blocks + stats.num_saved_blocks,
        "fetched": stats.num_fetched_blocks,
        "saved": stats.num_saved_blocks,
        "clean": stats.num_clean_blocks,
        "wasted": wasted,
    }
    return {f"{name}_bytes": count * block_bytes for name, count in counts.items()}


def by_source(by_name: Mapping[str, Floats], source: tuple[str, ...]) -> dict[str, Any]:
    """Return the latencies of each source apart."""
    sources = np.array(source)
    parts: dict[str, Any] = {}
    for name in sorted(set(source)):
        mine = sources == name
        parts[name] = {
            "completed": int(mine.sum()),
            **{figure: summary(values[mine]) for figure, values in by_name.items()},
        }
    return parts
