"""How much of a trace's prompts two tiers of KV find: `python -m experiments.prefix_hits`.

mooncake_conv, whose rows say which blocks their prompts begin with, at one load, with hosts of
several sizes behind one device. The bound is a cache without bounds in which a prompt stands as
soon as it arrives. Writes results/prefix_hits.json. Must not know: how KV is moved.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.harness import BLOCK_SIZE, Lab, Point, Result
from experiments.lengths import traces_folder
from experiments.markdown import markdown, number
from experiments.workload_traces import at_load, prepared, trace_file
from experiments.workloads import SETUP, capacities
from fastserve.host.provenance import ROOT, commit
from fastserve.sim.trace_file import read_trace
from fastserve.sim.workload import Workload

TRACE = "mooncake_conv"
LOAD = 0.7
POLICY, MODE = "learned", "proactive"
HOST_GIB = (0, 64, 256, 1024, 4096)
MARGIN = 0.02
"""A host suffices whose hit rate comes this close to the bound."""


def found_without_bounds(workload: Workload, block_size: int) -> int:
    """Return the prompt tokens whose KV would be there, were all prompts before them kept."""
    prompts, kept, found = workload.prompts(), set[bytes](), 0
    for row, num_tokens in enumerate(workload.prompt_tokens.tolist()):
        hashes = prompts.block_hashes(row, block_size) or []
        # One token is always computed: its logits are needed.
        most = min(len(hashes), (num_tokens - 1) // block_size)
        misses = (index for index in range(most) if hashes[index] not in kept)
        found += next(misses, most) * block_size
        kept.update(hashes)
    return found


def make_points(workload: Workload) -> list[Point]:
    """Return one simulation for each size of the host."""
    points = []
    for gib in HOST_GIB:
        setup = replace(SETUP, swap_space=float(gib))
        config = setup.config(POLICY, MODE, enable_prefix_caching=True)
        points.append(Point({"host_gib": gib}, config, setup.machine(), workload))
    return points


def entry_of(result: Result, bound: float, prompt_tokens: int) -> dict[str, Any]:
    """Return the figures of one size."""
    rate = result.report["cached_tokens"] / prompt_tokens
    return {
        "host_gib": result.labels["host_gib"],
        "hit_rate": rate,
        "points_below_bound": 100 * (bound - rate),
        "suffices": bound - rate <= MARGIN,
        "ttft_s": result.report["ttft_s"],
        "swap_in_bytes": result.report["swap_in_bytes"],
        "swap_out_bytes": result.report["swap_out_bytes"],
    }


def run(lab: Lab) -> None:
    """Simulate, save and print the table."""
    file = trace_file(lab, TRACE)
    if file is None:
        return
    num_rows = 100 if lab.is_quick else None
    trace = prepared(TRACE, read_trace(file, num_rows), keeps_prefixes=True)
    capacity = capacities(lab, {TRACE: replace(trace, hash_ids=None)})[TRACE]
    workload = at_load(trace, LOAD, capacity)
    prompt_tokens = int(workload.prompt_tokens.sum())
    bound = found_without_bounds(workload, BLOCK_SIZE) / prompt_tokens
    results = lab.run("prefix_hits", make_points(workload))
    entries = [entry_of(result, bound, prompt_tokens) for result in results]
    settings = {"machine": SETUP.describe(), "trace": file.name, "rows": len(workload),
                "load": LOAD, "policy": POLICY, "mode": MODE}  # fmt: skip
    figures = {"commit": commit(), "prompt_tokens": prompt_tokens, "bound": bound,
               "entries": entries}  # fmt: skip
    lab.save("prefix_hits", settings=settings, figures=figures)
    lab.console.print(table_of(entries, bound), markup=False)


def table_of(entries: Sequence[dict[str, Any]], bound: float) -> str:
    """Return a row per size of the host."""
    rows = [
        [number(entry["host_gib"]), f"{100 * entry['hit_rate']:.1f} %", f"{100 * bound:.1f} %",
         number(entry["ttft_s"]["p50"]), number(entry["ttft_s"]["mean"])]
        for entry in entries
    ]  # fmt: skip
    heads = ["host, GiB", "hit rate", "without bounds", "TTFT p50, s", "mean"]
    return markdown(heads, rows)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows: does it work?")
    parser.add_argument("--traces", help="folder of the traces")
    parser.add_argument("--output", type=Path, default=ROOT / "results")
    arguments = parser.parse_args()
    run(Lab(is_quick=arguments.quick, traces=traces_folder(arguments.traces),
            output=arguments.output,
            command=["python", "-m", "experiments.prefix_hits"]))  # fmt: skip


if __name__ == "__main__":
    main()
