"""What every layout of ranks computes, against one process: `python -m benchmarks.layout_grid`.

Runs tests/executor/test_distributed.py whole, the slow part of it too, which hold that every token
is the same, and writes what they compared: benchmarks/results/layout_grid.json and the table of
docs/distributed.md. Nine requests a cell and way: in chunks; preempted and recomputed; preempted
and swapped, each block that a rank moves held against what it was. Exits as pytest does.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.markdown import fill, markdown
from fastserve.host.provenance import ROOT, output_path, provenance, write_result

TESTS = "tests/executor/test_distributed.py"
RESULT = "benchmarks/results/layout_grid.json"
DOCUMENT = ROOT / "docs" / "distributed.md"
NAMES = re.compile(r"test_requests_(?P<way>.+)_are_those_of_one_process\[(?P<model>\w+)-"
                   r"tp(?P<tp>\d+)-pp(?P<pp>\d+)\]")  # fmt: skip
SUMS = ("requests", "requests_with_equal_tokens", "recomputed_tokens", "moves_checked",
        "moves_that_differ")  # fmt: skip
MOST = ("max_logprob_difference",)


def read_cases(report: Path) -> Iterator[dict[str, Any]]:
    """Yield what each test recorded, of those that passed."""
    for case in ElementTree.parse(report).iter("testcase"):
        named = NAMES.fullmatch(case.get("name", ""))
        if named is None or any(case.find(word) is not None for word in ("failure", "error")):
            continue
        told = {
            each.get("name", ""): float(each.get("value", "")) for each in case.iter("property")
        }
        labels = named.groupdict()
        yield {"model": labels["model"], "tp": int(labels["tp"]), "pp": int(labels["pp"]), **told}


def cells_of(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each layout and model, its ways taken together."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for case in cases:
        labels = {name: case[name] for name in ("tp", "pp", "model")}
        cell = found.setdefault(
            tuple(labels.values()),
            {**labels, "ways": 0, "steps_in_flight": 0, **dict.fromkeys((*SUMS, *MOST), 0)},
        )
        cell["ways"] += 1
        cell["steps_in_flight"] = max(cell["steps_in_flight"], int(case["steps_in_flight"]))
        for name in SUMS:
            cell[name] += int(case.get(name, 0))
        for name in MOST:
            cell[name] = max(cell[name], case[name])
    return [found[key] for key in sorted(found)]


def as_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return a row of the document for each layout, all models together."""
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    header = ["tensor × pipeline", "answers with equal tokens", "steps in flight",
              *(f"log probabilities, {model}" for model in models),
              "tokens recomputed", "blocks moved and checked", "that differ"]  # fmt: skip
    rows = []
    for layout in dict.fromkeys((cell["tp"], cell["pp"]) for cell in cells):
        mine = [cell for cell in cells if (cell["tp"], cell["pp"]) == layout]
        sums = {name: sum(cell[name] for cell in mine) for name in SUMS}
        rows.append([
            f"{layout[0]} × {layout[1]}",
            f"{sums['requests_with_equal_tokens']} of {sums['requests']}",
            str(max(cell["steps_in_flight"] for cell in mine)),
            *(f"{cell['max_logprob_difference']:.1e}"
              for model in models for cell in mine if cell["model"] == model),
            f"{sums['recomputed_tokens']:,}",
            f"{sums['moves_checked']:,}",
            str(sums["moves_that_differ"]),
        ])  # fmt: skip
    return markdown(header, rows)


def main() -> int:
    """Run the tests and write what they compared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=RESULT, help=f"JSON file ({RESULT})")
    args = parser.parse_args()
    output = output_path(args.output)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            TESTS,
            f"--junitxml={report}",
            "-o",
            "junit_family=xunit1",
        ]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        cells = cells_of(list(read_cases(report)))
    result = provenance(["python", "-m", "benchmarks.layout_grid"])
    write_result(output, {"benchmark": "layout_grid", **result, "cells": cells})
    fill(DOCUMENT, {"layout-grid": as_table(cells)})
    return status


if __name__ == "__main__":
    sys.exit(main())
