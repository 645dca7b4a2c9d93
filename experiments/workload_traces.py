"""The traces of docs/workloads.md: which rows, with which arrivals, and what they load.

Rules: lengths, arrivals and clients reach a simulation, nothing that would reuse a prefix. A load
is a share of the saturated throughput of FCFS on the same rows. Must not know: policies, tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.harness import Lab
from fastserve.sim.generators import arrivals, jittered
from fastserve.sim.trace_file import read_trace
from fastserve.sim.workload import Workload

WINDOW = 131_072
AGENT_SCALE = 0.25  # of the prompts of cc_agent, of which half exceed the window
CLOCK_S = 3.0  # of the log of mooncake_conv
# First rows of each trace: enough for several turns of the batch, in seconds of computing.
ROWS = {
    "alpaca": 1000, "arxiv_summ": 500, "azure23_code": 1000, "azure23_conv": 600,
    "bwb_longdecode": 300, "cc_agent": 300, "lmsys_arena27": 600, "mix_alpaca90_bwb10": 1000,
    "mooncake_conv": 400, "mooncake_synth": 400, "sharegpt8k_multiturn": 500, "sharegpt": 600,
    "sharegpt_predlen": 600,
}  # fmt: skip
SYNTHETIC = ("alpaca", "arxiv_summ", "bwb_longdecode", "mix_alpaca90_bwb10",
             "sharegpt8k_multiturn", "sharegpt", "sharegpt_predlen")  # fmt: skip
"""Traces of lengths, whose arrivals are drawn."""


def trace_file(lab: Lab, name: str) -> Path | None:
    """Return where a trace is; say it where it is not."""
    kind = "jsonl" if name.startswith(("mooncake", "cc_")) else "csv"
    file = (lab.traces or Path("no traces folder")) / f"{name}_dev.{kind}.gz"
    if file.is_file():
        return file
    lab.console.print(f"{name}: skipped, {file} does not exist")
    return None


def load_traces(lab: Lab, rows: Mapping[str, int] = ROWS) -> dict[str, Workload]:
    """Read what there is of the traces; say what there is not."""
    found: dict[str, Workload] = {}
    for name, num_rows in rows.items():
        file = trace_file(lab, name)
        if file is not None:
            found[name] = prepared(name, read_trace(file, lab.sized(num_rows, 60)))
    return found


def prepared(name: str, trace: Workload, *, keeps_prefixes: bool = False) -> Workload:
    """Return lengths, arrivals and clients: no prefix reuse, no sessions, no clock of 3 s.

    `keeps_prefixes` keeps the hash ids, for what can be learned from the beginning of a prompt.
    """
    hash_ids = trace.hash_ids if keeps_prefixes else None
    plain = dataclasses.replace(trace, hash_ids=hash_ids, session_id=None, think_s=None,
                                source=None)  # fmt: skip
    if name == "mooncake_conv":
        plain = jittered(np.random.default_rng(0), plain, CLOCK_S)
    if name == "cc_agent":
        scaled = np.ceil(plain.prompt_tokens * AGENT_SCALE).astype(np.int64)
        plain = dataclasses.replace(plain, prompt_tokens=scaled)
    return plain.fitted(WINDOW, "drop")


def redrawn(trace: Workload, seed: int) -> Workload:
    """Return the trace at other times, with exponential gaps; seed 0 leaves its own."""
    if seed == 0:
        return trace
    return trace.arriving(arrivals(np.random.default_rng(seed), len(trace), 1.0))


def at_load(trace: Workload, load: float, capacity: float) -> Workload:
    """Return the trace at a share of capacity; the shape of its bursts stays."""
    return trace.faster(load * capacity / trace.rate)


def at_once(trace: Workload) -> Workload:
    """Return the trace with all rows arriving at 0."""
    return trace.arriving(np.zeros(len(trace)))


def saturated_throughput(jct_s: Sequence[float], max_num_seqs: int) -> float:
    """Return requests/s when all arrive at once: from the first full batch that ends to the last.

    Neither the batches that fill up nor the last one, which empties, count.
    """
    ends = np.sort(np.array(jct_s))
    margin = min(max_num_seqs, len(ends) // 3)
    return float((len(ends) - 2 * margin) / (ends[-margin - 1] - ends[margin - 1]))


def describe(trace: Workload, capacity: float) -> dict[str, float]:
    """Return what a reader must know of the rows used."""
    return {
        "rows": len(trace),
        "dropped": trace.num_dropped,
        "prompt_mean": float(trace.prompt_tokens.mean()),
        "output_mean": float(trace.output_tokens.mean()),
        "output_cv2": float(trace.output_tokens.var() / trace.output_tokens.mean() ** 2),
        "gap_cv": float(np.diff(trace.arrived_at).std() / np.diff(trace.arrived_at).mean()),
        "capacity": capacity,
    }
