"""Workloads made against a policy that learns: `python -m experiments.adversaries`.

Lengths that turn round once they are learned, rare answers a hundred times as long, lengths that
are all alike, a client that floods, arrivals in heavy bursts: `learned` and `skip-join-mlfq`
beside FCFS on the same requests. Writes results/adversaries.json and a table of docs/workloads.md.
A section of requests is judged that begins when a half-life of answers is known. Must not know:
what a policy does about it.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.harness import Lab, Result
from experiments.lengths import GENERATED
from experiments.markdown import fill, markdown, number, share
from experiments.workload_traces import at_load
from experiments.workloads import COMPARED, SETUP, capacities, point
from fastserve.core.lengths import HALF_LIFE
from fastserve.host.provenance import ROOT, commit
from fastserve.sim.generators import Fixed, Lengths, Lognormal, Rng, arrivals, generate
from fastserve.sim.workload import Floats, Workload

LOADS = (0.9, 1.0)
MAX_MEAN, MAX_P99 = 1.05, 1.5  # over FCFS, of `learned` in the section that is judged
NUM_FOR_CAPACITY = 4000  # rare long answers decide it
SPREAD = 0.2  # sigma of the lognormal that "about" stands for
FLOOD_CYCLE_S, FLOOD_SHARE = 100.0, 0.1  # of the time that the flood is on, at 10 times the rate

Masks = dict[str, npt.NDArray[np.bool_]]
Judged = Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Adversary:
    """Requests at one a second and their sections, the last of which is judged."""

    workload: Workload
    sections: Masks


def about(tokens: float) -> Lognormal:
    """Return lengths around a median."""
    return Lognormal(tokens, SPREAD, 1, int(3 * tokens))


def interleaved(
    rng: Rng, is_first: npt.NDArray[np.bool_], first: Lengths, second: Lengths
) -> npt.NDArray[np.int64]:
    """Return lengths of two distributions, row by row as the mask says."""
    count = len(is_first)
    return np.where(is_first, first.draw(rng, count), second.draw(rng, count))


def since(num_rows: int, parts: Mapping[str, int]) -> Masks:
    """Return the sections that begin at these rows and end where the next one begins."""
    rows = np.arange(num_rows)
    ends = [*list(parts.values())[1:], num_rows]
    return {name: (begin <= rows) & (rows < end)
            for (name, begin), end in zip(parts.items(), ends, strict=True)}  # fmt: skip


def early_and_late(num_rows: int) -> Masks:
    """Return the requests of the first half-life and those after it."""
    return since(num_rows, {"first half-life": 0, "after": min(HALF_LIFE, num_rows // 2)})


def flipped(rng: Rng, count: int) -> Adversary:
    """Short prompts get long answers and long prompts short ones, and from half-time on not."""
    is_short = rng.random(count) < 0.5
    has_long_answer = is_short ^ (np.arange(count) >= count // 2)
    workload = Workload(
        arrived_at=arrivals(rng, count, 1.0),
        prompt_tokens=interleaved(rng, is_short, about(50), about(800)),
        output_tokens=interleaved(rng, has_long_answer, about(600), about(50)),
    )
    half = count // 2
    parts = {"before the flip": 0, "first half-life": half,
             "after": half + min(HALF_LIFE, count // 5)}  # fmt: skip
    return Adversary(workload, since(count, parts))


def rare(rng: Rng, count: int) -> Adversary:
    """One answer of a hundred is a hundred times as long, and nothing tells which."""
    workload = generate(rng, count, 1.0, about(100), Fixed(50))
    is_long = rng.random(count) < 0.01
    output = interleaved(rng, is_long, Fixed(5000), Fixed(50))
    return Adversary(dataclasses.replace(workload, output_tokens=output), early_and_late(count))


def alike(rng: Rng, count: int) -> Adversary:
    """All requests are of the same size: there is nothing to gain."""
    return Adversary(generate(rng, count, 1.0, Fixed(100), Fixed(150)), early_and_late(count))


def flooded(rng: Rng, count: int) -> Adversary:
    """One client sends half of all requests, short ones in bursts; the others are judged."""
    num_flood = count // 2
    others = generate(rng, count - num_flood, 1.0, *GENERATED["sharegpt"])
    on_s = arrivals(rng, num_flood, 1.0 / FLOOD_SHARE)
    lengths = Fixed(20).draw(rng, num_flood)
    times = np.concatenate([others.arrived_at, bursts(on_s)])
    order = np.argsort(times, kind="stable")
    users = [f"user {number}" for number in rng.integers(10, size=len(others))]
    clients = [*users, *["flood"] * num_flood]
    workload = Workload(
        arrived_at=times[order],
        prompt_tokens=np.concatenate([others.prompt_tokens, lengths])[order],
        output_tokens=np.concatenate([others.output_tokens, lengths])[order],
        client=tuple([clients[row] for row in order.tolist()]),
    )
    is_flood = order >= len(others)
    late = early_and_late(count)
    return Adversary(workload, {"the flood": is_flood,
                                "others, first half-life": late["first half-life"] & ~is_flood,
                                "others, after": late["after"] & ~is_flood})  # fmt: skip


def bursts(on_s: Floats) -> Floats:
    """Return times of a clock that runs in the first tenth of each cycle, on the wall's."""
    burst_s = FLOOD_CYCLE_S * FLOOD_SHARE
    return np.floor(on_s / burst_s) * FLOOD_CYCLE_S + on_s % burst_s


def bursty(rng: Rng, count: int) -> Adversary:
    """Gaps are Gamma with a coefficient of variation of 8; lengths are as ShareGPT's."""
    prompt, output = GENERATED["sharegpt"]
    return Adversary(generate(rng, count, 1.0, prompt, output, cv=8.0), early_and_late(count))


ADVERSARIES = {
    "lengths flip at half-time": (flipped, 10_000),
    "1 % of answers 100 times as long": (rare, 4000),
    "all alike": (alike, 3000),
    "a client floods": (flooded, 4000),
    "Gamma gaps, CV 8": (bursty, 3000),
}


def overtaken_s(arrived_at: Floats, began_at: Floats) -> Floats:
    """Return how much later than each row the latest arrived that began before it; at least 0."""
    order = np.lexsort((arrived_at, began_at))
    latest = np.maximum.accumulate(arrived_at[order])
    overtaken = np.empty(len(order))
    overtaken[order] = latest - arrived_at[order]
    return overtaken


def judge(adversary: Adversary, arrived_at: Floats, mine: Result, fcfs: Result) -> list[Judged]:
    """Return the figures of each section of one run beside those of FCFS."""
    jct, base = np.array(mine.rows["jct_s"]), np.array(fcfs.rows["jct_s"])
    ttft, base_ttft = np.array(mine.rows["ttft_s"]), np.array(fcfs.rows["ttft_s"])
    overtaken = overtaken_s(arrived_at, arrived_at + ttft)
    found = []
    for section, rows in adversary.sections.items():
        mean = float(jct[rows].mean() / base[rows].mean())
        p99 = float(np.percentile(jct[rows], 99) / np.percentile(base[rows], 99))
        found.append({
            **mine.labels,
            "section": section,
            "requests": int(rows.sum()),
            "fcfs_mean_s": float(base[rows].mean()),
            "mean_over_fcfs": mean,
            "p99_over_fcfs": p99,
            "latest_after_fcfs_s": float((jct - base)[rows].max()),
            "longest_wait_s": float(ttft[rows].max()),
            "longest_wait_of_fcfs_s": float(base_ttft[rows].max()),
            "overtaken_s": float(overtaken[rows].max()),
            "is_judged": section == list(adversary.sections)[-1],
            "passes": mean <= MAX_MEAN and p99 <= MAX_P99,
        })  # fmt: skip
    return found


def made(lab: Lab) -> dict[str, Adversary]:
    """Return every adversary, each of a generator of its own."""
    return {
        name: make(np.random.default_rng(index), lab.sized(count, 200))
        for index, (name, (make, count)) in enumerate(ADVERSARIES.items())
    }


def run(lab: Lab, document: Path) -> None:
    """Measure, save, write the table and say which targets are missed."""
    adversaries = made(lab)
    capacity = capacities(lab, {name: thinned(adversary.workload)
                                for name, adversary in adversaries.items()})  # fmt: skip
    points = [
        point({"workload": name, "load": load}, at_load(adversary.workload, load, capacity[name]),
              policy)
        for name, adversary in adversaries.items() for load in LOADS for policy in COMPARED
    ]  # fmt: skip
    results = lab.run("adversaries", points)
    entries: list[Judged] = []
    for index in range(0, len(points), len(COMPARED)):
        fcfs, *others = results[index : index + len(COMPARED)]
        arrived_at = points[index].workload.arrived_at
        adversary = adversaries[str(fcfs.labels["workload"])]
        entries += [entry for mine in others for entry in judge(adversary, arrived_at, mine, fcfs)]
    settings = {
        "machine": SETUP.describe(),
        "loads": LOADS,
        "targets": {"mean over that of FCFS": MAX_MEAN, "P99 over that of FCFS": MAX_P99},
        "half_life_answers": HALF_LIFE,
        "seeds": "the position of the workload in the list, from 0",
    }
    figures = {"commit": commit(), "capacity": capacity, "entries": entries}
    lab.save("adversaries", settings=settings, figures=figures)
    for entry in entries:
        if entry["is_judged"] and entry["policy"] == "learned":
            lab.console.print(f"{entry['workload']}, load {entry['load']:g}: {verdict(entry)}")
    if not lab.is_quick:
        fill(document, {"adversaries": table_of(entries)})


def thinned(workload: Workload) -> Workload:
    """Return rows evenly from all of it, enough to measure a capacity."""
    step = -(-len(workload) // NUM_FOR_CAPACITY)
    return workload.rows(np.arange(0, len(workload), step))


def verdict(entry: Judged) -> str:
    """Return whether the targets are met."""
    return "pass" if entry["passes"] else "**fail**"


def table_of(entries: Sequence[Judged]) -> str:
    """Return a row per section and load, with the policies side by side."""
    by_row: dict[tuple[str, float, str], dict[str, Judged]] = {}
    for entry in entries:
        row = (entry["workload"], entry["load"], entry["section"])
        by_row.setdefault(row, {})[entry["policy"]] = entry
    policies = [policy for policy in COMPARED if policy != "fcfs"]
    rows = []
    for (workload, load, section), found in by_row.items():
        learned = found["learned"]
        cells = [workload, f"{load:g}", section, f"{number(learned['fcfs_mean_s'])} s"]
        cells += [cell(found[policy]) for policy in policies]
        cells += [f"{number(learned['overtaken_s'])} s",
                  verdict(learned) if learned["is_judged"] else ""]  # fmt: skip
        rows.append(cells)
    return markdown(["workload", "load", "requests", "fcfs", *policies, "overtaken by", "target"],
                    rows)  # fmt: skip


def cell(entry: Judged) -> str:
    """Return mean JCT over that of FCFS; P99 JCT over that of FCFS; the latest end after FCFS's."""
    mean, tail = share(entry["mean_over_fcfs"]), share(entry["p99_over_fcfs"])
    return f"{mean}; {tail}; {number(entry['latest_after_fcfs_s'])} s"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few requests: does it work?")
    parser.add_argument("--output", type=Path, default=ROOT / "results")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "workloads.md")
    arguments = parser.parse_args()
    lab = Lab(is_quick=arguments.quick, output=arguments.output,
              command=["python", "-m", "experiments.adversaries"])  # fmt: skip
    run(lab, arguments.document)


if __name__ == "__main__":
    main()
