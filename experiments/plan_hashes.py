"""One hash of all plans for each development trace, policy and KV mode, with the mean JCT.

    python -m experiments.plan_hashes [--output FILE] [--against FILE]

A refactor of the core leaves every hash as it was; a change of plans shows how far mean JCT moves.
KV is short enough under `recompute` that requests lose theirs. Must not know: how plans are made.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness import BLOCK_SIZE, Lab
from experiments.lengths import traces_folder
from experiments.workloads import SETUP, at_load, load_traces
from fastserve.core.messages import SchedulerOutput
from fastserve.host.provenance import ROOT, provenance
from fastserve.host.terminal import say
from fastserve.settings.scheduler import pool_window
from fastserve.sim.simulator import simulate
from fastserve.sim.workload import Workload

POLICIES = ("fcfs", "skip-join-mlfq")
MODES = ("ideal", "recompute")
NUM_REQUESTS = 200
COMMAND = ["python", "-m", "experiments.plan_hashes"]
LOAD = 1.0
SHORT_BLOCKS = 3.0  # KV under `recompute`, in whole answers of the longest request
WORKLOADS = ROOT / "results" / "workloads.json"


class PlanHash:
    """A running sha256 over the plans that reach the device."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def on_step(self, plan: SchedulerOutput, stages: Sequence[tuple[float, float]]) -> None:
        """Take one plan in, with the time at which it begins."""
        parts = [
            (w.handle, w.epoch, w.start, w.num_tokens, w.table_from, list(w.block_ids), w.sample)
            for w in plan.work
        ]
        line = (plan.step_id, stages[0][0].hex(), parts)
        self._digest.update(repr(line).encode())

    @property
    def sha256(self) -> str:
        """Return the hash of all plans so far."""
        return self._digest.hexdigest()


def run(name: str, trace: Workload, policy: str, mode: str) -> tuple[str, dict[str, Any]]:
    """Return the label and the figures of one simulation."""
    machine = SETUP.machine()
    changes: dict[str, int] = {}
    if mode == "recompute":
        longest = int((trace.prompt_tokens + trace.output_tokens).max())
        num_blocks = int(SHORT_BLOCKS * (longest // BLOCK_SIZE + 2))
        machine = dataclasses.replace(machine, num_device_blocks=num_blocks)
        window = pool_window(SETUP.config(policy).max_model_len, num_blocks, BLOCK_SIZE)
        changes = {"max_num_seqs": 64, "max_model_len": window}
    plans = PlanHash()
    outcome = simulate(SETUP.config(policy, mode, **changes), machine, trace,
                       on_step=plans.on_step)  # fmt: skip
    jct_s = outcome.finished_at - outcome.arrived_at
    return f"{name} {policy} {mode}", {
        "plans_sha256": plans.sha256,
        "mean_jct_s": float(f"{np.mean(jct_s):.6g}"),
        "preemptions": outcome.stats.num_preemptions,
        "recomputed_tokens": outcome.stats.num_recomputed_tokens,
    }


def main() -> int:
    """Run the grid; exit 1 when a hash differs from that in --against."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--against", type=Path)
    args = parser.parse_args()
    traces = load_traces(Lab(traces=traces_folder()))
    measured = json.loads(WORKLOADS.read_text(encoding="utf-8"))["figures"]["traces"]
    timed = {name: at_load(trace.first(NUM_REQUESTS), LOAD, measured[name]["capacity"])
             for name, trace in traces.items()}  # fmt: skip
    jobs = [(name, trace, policy, mode)
            for name, trace in timed.items() for policy in POLICIES for mode in MODES]  # fmt: skip
    with ProcessPoolExecutor(2) as pool:
        figures = dict(pool.map(run, *zip(*jobs, strict=True)))
    if args.output:
        whole = {"provenance": provenance(COMMAND + sys.argv[1:]), "figures": figures}
        args.output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    num_different = 0
    before = json.loads(args.against.read_text())["figures"] if args.against else {}
    for label, row in figures.items():
        old = before.get(label)
        note = ""
        if old is not None and old["plans_sha256"] != row["plans_sha256"]:
            num_different += 1
            note = f"  DIFFERENT, mean JCT {row['mean_jct_s'] / old['mean_jct_s'] - 1:+.2%}"
        say(f"{label}: {row['plans_sha256'][:16]}, mean JCT {row['mean_jct_s']} s{note}")
    say(f"{len(figures)} simulations, {num_different} different")
    return 1 if num_different else 0


if __name__ == "__main__":
    sys.exit(main())
