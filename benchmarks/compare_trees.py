"""Two checkouts against each other: `fastserve bench` in turns, A B, B A, …, as ratios.

    python -m benchmarks.compare_trees OTHER --pairs 5 [--output FILE] -- scheduler
    python -m benchmarks.compare_trees OTHER --pairs 5 -- offline --model DIR --load-format dummy

OTHER is A, this checkout is B; the words after -- are those of `fastserve bench`. A machine's speed
drifts by more than what is compared, so each pair runs back to back and its ratio counts.
Must not know: what the benchmarks measure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastserve.host.provenance import ROOT, provenance


def measure(tree: Path, words: Sequence[str]) -> dict[str, Any]:
    """Return the JSON of one run of `fastserve bench` on a checkout's code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "out.json"
        subprocess.run(
            (sys.executable, "-m", "fastserve", "bench", *words, "--output", str(file)),
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return dict(json.loads(file.read_text(encoding="utf-8")))


def figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Return what is compared of a run: ms of the scheduler's rows, or tokens a second."""
    if "rows" in result:
        return {
            f"ms, {row['running']} running, {row['waiting']} waiting": row["median_ms"]
            for row in result["rows"]
        }
    rates = {
        f"tokens/s, batch {row['batch_size']}": row["tokens_per_s"] for row in result["decode"]
    }
    return rates | {"tokens/s, prefill": result["prefill"]["tokens_per_s"]}


def main() -> int:
    """Run the pairs and print, of each figure, the ratios B / A and their median."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("words", nargs="+")
    args = parser.parse_args()
    trees = {"a": args.other.resolve(), "b": ROOT}
    pairs: list[dict[str, dict[str, Any]]] = []
    for index in range(args.pairs):
        names = ("a", "b") if index % 2 == 0 else ("b", "a")
        pairs.append({name: measure(trees[name], args.words) for name in names})
    ratios: dict[str, list[float]] = {}
    for pair in pairs:
        before, after = figures(pair["a"]), figures(pair["b"])
        for name in before.keys() & after.keys():
            ratios.setdefault(name, []).append(round(after[name] / before[name], 3))
    medians = {name: round(statistics.median(ratios[name]), 3) for name in sorted(ratios)}
    for name, median in medians.items():
        print(f"{name}: {median} of {ratios[name]}")
    if args.output:
        whole = {
            "a": pairs[0]["a"]["commit"],
            **provenance(["python", "-m", "benchmarks.compare_trees", "A", *args.words]),
            "ratio_b_over_a": medians,
            "ratios": ratios,
            "runs": [{name: figures(run) for name, run in pair.items()} for pair in pairs],
        }
        args.output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
