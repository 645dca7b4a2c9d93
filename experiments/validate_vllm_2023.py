"""Replays measured runs of vLLM in the simulator and compares (first-come-first-served, one A100).

    python -m experiments.validate_vllm_2023 [--fit]

The runs are DistServe's ground truth: OPT-13B on one A100-80G, 1 to 4 requests a second. Each
row's arrival and lengths are replayed. The engine's two overhead numbers are the preset's; with
--fit, the grid point whose worst error in mean JCT over all rates is least, after which the preset
is to be set by hand. The KV pool is the most that the measured runs ever held at once, and results
with other pools are given beside it.
Writes results/validate_vllm_2023.json. Must not know: how steps are timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.published_tables import PROFILES, rows_of
from fastserve.host.provenance import ROOT, provenance
from fastserve.host.terminal import print_table
from fastserve.settings.scheduler import SchedulerConfig, pool_window
from fastserve.sim.hardware import resolve_cost_model
from fastserve.sim.sim_executor import EOS_TOKEN_ID, StepOverhead
from fastserve.sim.simulator import Machine, simulate
from fastserve.sim.workload import Workload

ENGINE = "vllm-2023"
BLOCK_SIZE = 16
MAX_NUM_SEQS = 256
MAX_NUM_BATCHED_TOKENS = 2560
DISTSERVE_POOL_TOKENS = 66_144
FIXED_MS = np.arange(0.0, 5.01, 0.5)
PER_SEQ_MS = np.arange(0.0, 0.41, 0.05)
RESULTS = ROOT / "results" / "validate_vllm_2023.json"


class Run(NamedTuple):
    """One measured run: times in seconds, by row."""

    rate: float
    workload: Workload
    ttft_s: np.ndarray
    jct_s: np.ndarray


def measured_runs() -> list[Run]:
    """Read vLLM's runs, by rate."""
    groups: dict[float, list[dict[str, str]]] = defaultdict(list)
    for row in rows_of("distserve_groundtruth_opt13b_a100_dev"):
        if row["system"] == "vllm":
            groups[float(row["rate"])].append(row)
    runs = []
    for rate, rows in sorted(groups.items()):
        rows.sort(key=lambda row: float(row["arrived_at"]))

        def column(name: str, rows: list[dict[str, str]] = rows) -> np.ndarray:
            return np.array([float(row[name]) for row in rows])

        workload = Workload(
            arrived_at=column("arrived_at"),
            prompt_tokens=column("prompt_tokens").astype(np.int64),
            output_tokens=column("output_tokens").astype(np.int64),
        )
        runs.append(Run(rate, workload, column("ttft_ms") / 1e3, column("latency_ms") / 1e3))
    return runs


def held_blocks(runs: list[Run]) -> int:
    """Return the most KV blocks that answers under way held together, from their own times.

    Between its first and last token an answer is taken to grow evenly.
    """
    most = 0
    for run in runs:
        begins = run.workload.arrived_at + run.ttft_s
        ends = run.workload.arrived_at + run.jct_s
        for now in np.arange(0.0, float(ends.max()), 0.25):
            is_live = (begins <= now) & (now < ends)
            share = (now - begins[is_live]) / (ends - begins)[is_live]
            tokens = (
                run.workload.prompt_tokens[is_live] + share * run.workload.output_tokens[is_live]
            )
            most = max(most, int(np.ceil(tokens / BLOCK_SIZE).sum()))
    return most


def replay(run: Run, num_device_blocks: int, overhead: StepOverhead | None) -> dict[str, float]:
    """Run a measured workload in the simulator; `overhead` None: the preset's."""
    fit = resolve_cost_model(
        "opt-13b", "a100-80g", num_device_blocks=num_device_blocks, engine=ENGINE
    )
    config = SchedulerConfig(
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        max_model_len=pool_window(fit.max_model_len, num_device_blocks, BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        enable_chunked_prefill=False,
        enable_prefix_caching=False,
        scheduling_policy="fcfs",
        eos_token_ids=frozenset({EOS_TOKEN_ID}),
        is_strict=True,
    )
    machine = Machine(
        cost_model=fit.cost_model,
        num_device_blocks=num_device_blocks,
        overhead=overhead or fit.overhead,
    )
    outcome = simulate(config, machine, run.workload)
    jct_s = float(np.mean(outcome.finished_at - outcome.arrived_at))
    ttft_s = float(np.mean(outcome.first_token_at - outcome.arrived_at))
    measured_jct_s, measured_ttft_s = float(run.jct_s.mean()), float(run.ttft_s.mean())
    return {
        "rate": run.rate,
        "requests": len(run.workload),
        "measured_jct_s": round(measured_jct_s, 3),
        "simulated_jct_s": round(jct_s, 3),
        "jct_error": round(jct_s / measured_jct_s - 1.0, 4),
        "measured_ttft_s": round(measured_ttft_s, 3),
        "simulated_ttft_s": round(ttft_s, 3),
        "ttft_ratio": round(ttft_s / measured_ttft_s, 3),
        "preemptions": outcome.stats.num_preemptions,
        "steps": outcome.num_steps,
    }


def fit_overhead(runs: list[Run], num_device_blocks: int, console: Console) -> StepOverhead:
    """Return the two numbers under which the worst error in mean JCT is least."""
    best = (float("inf"), StepOverhead())
    with console.status("fitting") as status:
        for fixed_ms in FIXED_MS.tolist():
            status.update(f"fitting: {fixed_ms:.1f} ms fixed")
            for per_seq_ms in PER_SEQ_MS.tolist():
                overhead = StepOverhead(
                    round(fixed_ms / 1e3, 6), round(per_seq_ms / 1e3, 6), has_separate_passes=True
                )
                rows = [replay(run, num_device_blocks, overhead) for run in runs]
                best = min(best, (max(abs(row["jct_error"]) for row in rows), overhead))
    return best[1]


def variants(runs: list[Run], num_blocks: int, overhead: StepOverhead) -> dict[str, Any]:
    """Return the comparison, and what it would be with one thing different."""
    capacity = resolve_cost_model("opt-13b", "a100-80g").num_device_blocks
    distserve = DISTSERVE_POOL_TOKENS // BLOCK_SIZE
    mixed = overhead._replace(has_separate_passes=False)
    none = StepOverhead(has_separate_passes=True)
    cases = {
        "preset": (num_blocks, overhead),
        "pool of the memory arithmetic": (capacity, overhead),
        "pool of DistServe's tables": (distserve, overhead),
        "no overhead": (num_blocks, none),
        "prompts and decodes in one batch": (num_blocks, mixed),
    }
    return {
        name: {
            "kv_tokens": blocks * BLOCK_SIZE,
            "overhead": case._asdict(),
            "rates": [replay(run, blocks, case) for run in runs],
        }
        for name, (blocks, case) in cases.items()
    }


def main() -> int:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--fit", action="store_true", help="fit the two overhead numbers first")
    is_fitting = parser.parse_args().fit
    console = Console()
    if not PROFILES.is_dir():
        console.print(f"skipped: the published tables are not here ({PROFILES})")
        return 0
    runs = measured_runs()
    num_blocks = held_blocks(runs)
    fit = resolve_cost_model("opt-13b", "a100-80g", num_device_blocks=num_blocks, engine=ENGINE)
    overhead = fit_overhead(runs, num_blocks, console) if is_fitting else fit.overhead
    results = variants(runs, num_blocks, overhead)
    console.print(f"{fit.source}\nKV pool: {num_blocks * BLOCK_SIZE} tokens, as the runs held")
    console.print(f"overhead {'fitted' if is_fitting else 'of the preset'}: {overhead}")
    for name, case in results.items():
        table = Table("req/s", "mean JCT: measured", "simulated", "error",
                      "mean TTFT: measured", "simulated", title=name)  # fmt: skip
        for row in case["rates"]:
            table.add_row(
                f"{row['rate']:g}",
                f"{row['measured_jct_s']:.2f} s", f"{row['simulated_jct_s']:.2f} s",
                f"{row['jct_error']:+.1%}",
                f"{row['measured_ttft_s']:.3f} s", f"{row['simulated_ttft_s']:.3f} s",
            )  # fmt: skip
        print_table(table)
    if not is_fitting:
        command = ["python", "-m", "experiments.validate_vllm_2023"]
        result = {"provenance": provenance(command), "source": fit.source, "cases": results}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
