"""What tensor and pipeline parallelism come to, by the simulator: `python -m experiments.layouts`.

One copy of a model over 1 to 64 devices: how soon one request alone is answered, and how many
tokens a second come out when all seats are taken. Copies beside it (data parallel) multiply the
second and leave the first. Writes results/layouts.json and the tables of docs/distributed.md. The
simulator knows one link, NVLink: between hosts, what a network is slower by comes on top.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness import Lab, Point, Result, Setup
from experiments.markdown import fill, markdown, number
from experiments.workload_traces import saturated_throughput
from fastserve.host.provenance import ROOT, commit
from fastserve.sim.workload import Workload

DOCUMENT = ROOT / "docs" / "distributed.md"
POLICY = "fcfs"
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 256  # in the mean; evenly spread from 1 on
NUM_SEATS = 256  # of a step
ROUNDS = 4  # requests for each seat
SCHEDULER = {"max_num_batched_tokens": 2048, "enable_chunked_prefill": True}
LAYOUTS = {
    ("llama-3-8b", "h100"): ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4)),
    ("llama-3-70b", "h100"): (
        (4, 1), (8, 1), (2, 2), (4, 2), (2, 4), (8, 2), (4, 4), (8, 8),
    ),
    ("opt-175b", "a100-40g"): ((16, 1), (8, 2), (4, 4), (2, 8), (8, 4), (8, 8)),
}  # fmt: skip


def workload(num_requests: int) -> Workload:
    """Return requests that all arrive at once, or one of mean lengths."""
    rng, shape = np.random.default_rng(0), (num_requests,)
    if num_requests == 1:
        prompts, outputs = np.full(shape, PROMPT_TOKENS), np.full(shape, OUTPUT_TOKENS)
    else:
        prompts = rng.integers(1, 2 * PROMPT_TOKENS, shape)
        outputs = rng.integers(1, 2 * OUTPUT_TOKENS, shape)
    return Workload(arrived_at=np.zeros(num_requests), prompt_tokens=prompts, output_tokens=outputs)


def setup_of(model: str, hardware: str, layout: tuple[int, int]) -> Setup:
    """Return one copy of a model over tensor × pipeline devices."""
    tensor, pipeline = layout
    return Setup(
        model, hardware, tensor, pipeline, max_num_seqs=NUM_SEATS, swap_space=0.0,
        scheduler=SCHEDULER,
    )  # fmt: skip


def points(lab: Lab) -> list[Point]:
    """Return two simulations for each layout: one request, and more than there are seats for."""
    found = []
    for (model, hardware), layouts in LAYOUTS.items():
        for layout in lab.some(layouts):
            setup = setup_of(model, hardware, layout)
            labels = {"model": model, "hardware": hardware, "tp": layout[0], "pp": layout[1]}
            many = lab.sized(ROUNDS * NUM_SEATS * layout[1], 40)
            for kind, number_of in (("alone", 1), ("full", many)):
                found.append(
                    Point({**labels, "kind": kind}, setup.config(POLICY), setup.machine(),
                          workload(number_of))
                )  # fmt: skip
    return found


def entry_of(alone: Result, full: Result) -> dict[str, Any]:
    """Return the figures of one layout."""
    labels = alone.labels
    num_devices = int(labels["tp"]) * int(labels["pp"])
    seats = min(int(full.report["peak_live_requests"]), NUM_SEATS * int(labels["pp"]))
    rate = OUTPUT_TOKENS * saturated_throughput(full.rows["jct_s"], seats)
    return {
        **{name: labels[name] for name in ("model", "hardware", "tp", "pp")},
        "num_devices": num_devices,
        "ttft_ms": 1e3 * alone.report["ttft_s"]["mean"],
        "tpot_ms": 1e3 * alone.report["tpot_s"]["mean"],
        "seats": seats,
        "output_tokens_per_s": rate,
        "per_device": rate / num_devices,
        "tpot_full_ms": 1e3 * full.report["tpot_s"]["mean"],
    }


def table_of(entries: Sequence[dict[str, Any]]) -> str:
    """Return a row per layout."""
    header = ["devices", "tensor × pipeline", "alone: first token, ms", "ms a token",
              "full: requests", "ms a token", "tokens/s", "tokens/s a device"]  # fmt: skip
    names = ("ttft_ms", "tpot_ms", "seats", "tpot_full_ms", "output_tokens_per_s", "per_device")
    return markdown(header, (
        [str(entry["num_devices"]), f"{entry['tp']} × {entry['pp']}",
         *(number(entry[name]) for name in names)]
        for entry in entries
    ))  # fmt: skip


def run(lab: Lab) -> None:
    """Simulate, save and write the tables."""
    results = lab.run("layouts", points(lab))
    entries = [
        entry_of(alone, full) for alone, full in zip(results[::2], results[1::2], strict=True)
    ]
    settings = {"prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS,
                "seats": NUM_SEATS, "policy": POLICY, "scheduler": SCHEDULER}  # fmt: skip
    lab.save("layouts", settings=settings, figures={"commit": commit(), "entries": entries})
    tables = {
        model: table_of([entry for entry in entries if entry["model"] == model])
        for model, _ in LAYOUTS
    }
    for name, table in tables.items():
        lab.console.print(f"{name}\n{table}", markup=False)
    if not lab.is_quick:
        fill(DOCUMENT, tables)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few requests: does it work?")
    parser.add_argument("--output", type=Path, default=ROOT / "results")
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    run(Lab(is_quick=arguments.quick, output=arguments.output, num_workers=arguments.workers,
            command=["python", "-m", "experiments.layouts"]))  # fmt: skip


if __name__ == "__main__":
    main()
