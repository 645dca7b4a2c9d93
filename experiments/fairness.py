"""One tenant floods: what becomes of another's completion times: `python -m experiments.fairness`.

A quiet tenant asks for less than half of what the machine can answer, and another sends more than
all of it: more of the same, short requests, long prompts, long answers. The quiet one's completion
times beside the flood over those that it has alone, under FCFS, under `learned`, and under
`learned` with fair shares, with steps of the default length and shorter ones. Writes
results/fairness.json and a table of docs/scheduling.md.
Must not know: what a policy does about it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness import Lab, Point, Result
from experiments.lengths import GENERATED
from experiments.markdown import fill, markdown, number, quotient
from experiments.workloads import SETUP, capacities, point
from fastserve.host.provenance import ROOT, commit
from fastserve.sim.generators import Fixed, Lengths, beside, generate
from fastserve.sim.workload import Workload

QUIET, FLOOD = "quiet", "flood"
QUIET_LOAD = 0.4
NUM_QUIET = 200
NUM_FOR_CAPACITY = 600
MAX_RATIO = 2.0  # of the quiet tenant's mean, beside a flood over alone

Pair = tuple[Lengths, Lengths]
LENGTHS: Pair = GENERATED["sharegpt"]
FLOODS: Mapping[str, tuple[Pair, float]] = {
    "the same, at 1 × capacity": (LENGTHS, 1.0),
    "the same, at 3 × capacity": (LENGTHS, 3.0),
    "prompts of 1,500 and answers of 20, at 2 ×": ((Fixed(1500), Fixed(20)), 2.0),
    "prompts of 20 and answers of 1,500, at 2 ×": ((Fixed(20), Fixed(1500)), 2.0),
}
FAIR = "learned, --fairness"
FAIR_IN_SHORT_STEPS = f"{FAIR}, 512 tokens a step"
ARMS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "fcfs": ("fcfs", {}),
    "learned": ("learned", {}),
    FAIR: ("learned", {"fairness": True}),
    FAIR_IN_SHORT_STEPS: ("learned", {"fairness": True, "max_num_batched_tokens": 512}),
}


def quiet_requests(count: int, capacity: float) -> Workload:
    """Return the requests of the tenant that is judged."""
    return generate(np.random.default_rng(1), count, QUIET_LOAD * capacity, *LENGTHS)


def flood_requests(pair: Pair, rate: float, until_s: float) -> Workload:
    """Return what the other sends as long as the first one does."""
    return generate(np.random.default_rng(2), max(int(rate * until_s), 1), rate, *pair)


def make_points(lab: Lab) -> list[Point]:
    """Return the quiet tenant alone, and then each flood under each arm."""
    drawn = {
        name: generate(np.random.default_rng(3), lab.sized(NUM_FOR_CAPACITY, 60), 1.0, *pair)
        for name, (pair, _) in FLOODS.items()
    }
    capacity = capacities(lab, drawn)
    quiet = quiet_requests(lab.sized(NUM_QUIET), capacity["the same, at 1 × capacity"])
    until_s = float(quiet.arrived_at[-1])
    alone = beside({QUIET: quiet})
    points = [point({"flood": "", "arm": "learned"}, alone, "learned")]
    for name, (pair, times) in FLOODS.items():
        flood = flood_requests(pair, times * capacity[name], until_s)
        workload = beside({FLOOD: flood, QUIET: quiet})
        points += [
            point({"flood": name, "arm": arm}, workload, policy, **changes)
            for arm, (policy, changes) in ARMS.items()
        ]
    return points


def entry_of(result: Result, alone: Result) -> dict[str, Any]:
    """Return the figures of one run beside those of the quiet tenant alone."""
    mine, base = result.report["by_source"], alone.report["by_source"][QUIET]["jct_s"]
    jct = mine[QUIET]["jct_s"]
    return {
        **result.labels,
        "quiet_mean_s": jct["mean"],
        "quiet_p99_s": jct["p99"],
        "quiet_mean_over_alone": quotient(jct["mean"], base["mean"]),
        "quiet_p99_over_alone": quotient(jct["p99"], base["p99"]),
        "flood_mean_s": mine[FLOOD]["jct_s"]["mean"] if FLOOD in mine else None,
        "flood_requests": mine[FLOOD]["completed"] if FLOOD in mine else 0,
    }


def table_of(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return a row for each flood: mean and P99 over those alone, and the flood's own mean."""
    rows = []
    for flood in FLOODS:
        found = {entry["arm"]: entry for entry in entries if entry["flood"] == flood}
        cells = [
            f"{number(found[arm]['quiet_mean_over_alone'])}; "
            f"{number(found[arm]['quiet_p99_over_alone'])}"
            for arm in ARMS
        ]
        own = " / ".join(number(found[arm]["flood_mean_s"]) for arm in ARMS)
        rows.append([flood, *cells, own])
    return markdown(["the flood", *ARMS, "its own mean, s"], rows)


def run(lab: Lab, document: Path) -> None:
    """Simulate, save, write the table and say where the target is missed."""
    alone, *others = lab.run("fairness", make_points(lab))
    entries = [entry_of(result, alone) for result in (alone, *others)]
    settings = {
        "machine": SETUP.describe(),
        "quiet": {"load": QUIET_LOAD, "requests": lab.sized(NUM_QUIET), "lengths": "sharegpt"},
        "target": {"mean beside a flood over that alone": MAX_RATIO},
        "seeds": {"quiet": 1, "flood": 2, "capacity": 3},
    }
    lab.save("fairness", settings=settings, figures={"commit": commit(), "entries": entries})
    for entry in entries[1:]:
        if entry["arm"] in (FAIR, FAIR_IN_SHORT_STEPS):
            verdict = "pass" if entry["quiet_mean_over_alone"] <= MAX_RATIO else "fail"
            lab.console.print(f"{entry['flood']}; {entry['arm']}: {verdict}")
    if not lab.is_quick:  # as it was saved: digits and all
        saved = json.loads((lab.output / "fairness.json").read_text(encoding="utf-8"))
        fill(document, {"fairness": table_of(saved["figures"]["entries"])})


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few requests: does it work?")
    parser.add_argument("--output", type=Path, default=ROOT / "results")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "scheduling.md")
    arguments = parser.parse_args()
    lab = Lab(is_quick=arguments.quick, output=arguments.output,
              command=["python", "-m", "experiments.fairness"])  # fmt: skip
    run(lab, arguments.document)


if __name__ == "__main__":
    main()
