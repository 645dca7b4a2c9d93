"""Plants every defect of the table in turn and says who noticed; `scripts/plant` calls it.

Each has tests named for it, and all meet the seeds of the simulation; one that neither of them
notices has survived, and the exit status is 1. Must not know: how a defect is planted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from fastserve.host.provenance import ROOT, output_path, provenance, write_result
from tests.planted.defects import DEFECTS, Defect
from tests.planted.planting import Verdict, copy_tree, planted_in, run_seeds, run_tests

Item = TypeVar("Item")
Result = TypeVar("Result")


def main(arguments: Sequence[str]) -> int:
    """Plant what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/plant", description=__doc__)
    parser.add_argument("--only", default="", metavar="WORDS", help="those with WORDS in the name")
    parser.add_argument(
        "--seeds", type=int, default=40, help="of the simulation, for each (40; 0: none)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="at a time, each in its own copy (1)")
    parser.add_argument("--summary", metavar="FILE", help="write the table as JSON")
    options = parser.parse_args(arguments)
    chosen = [defect for defect in DEFECTS if options.only in defect.name]
    summary = None if options.summary is None else output_path(options.summary, "--summary")
    origin = provenance(["scripts/plant", *arguments])
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        roots = [Path(folder, str(number)) for number in range(options.jobs)]
        for root in roots:
            copy_tree(ROOT, root)
        copies = Copies(roots)
        if not _is_sound(copies, chosen, options.seeds):
            return 2
        rows = copies.map(partial(_judge, num_seeds=options.seeds), chosen)
    num_caught = sum(bool(row["caught"]) for row in rows)
    print(f"caught/planted: {num_caught}/{len(rows)}")
    if summary is not None:
        figures = {"planted": len(rows), "caught": num_caught, "seeds": options.seeds}
        write_result(summary, origin | figures | {"defects": rows})
    return 0 if num_caught == len(rows) else 1


class Copies:
    """Copies of the tree, each of use to one at a time."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._num_roots = len(roots)
        self._idle: SimpleQueue[Path] = SimpleQueue()
        for root in roots:
            self._idle.put(root)

    def map(self, act: Callable[[Path, Item], Result], items: Sequence[Item]) -> list[Result]:
        """Act on every item in some copy, as many at a time as there are; return in order."""

        def act_in_copy(item: Item) -> Result:
            root = self._idle.get()
            try:
                return act(root, item)
            finally:
                self._idle.put(root)

        with ThreadPoolExecutor(self._num_roots) as pool:
            return list(pool.map(act_in_copy, items))


def _is_sound(copies: Copies, defects: Sequence[Defect], num_seeds: int) -> bool:
    """Return whether all pass where nothing is planted."""
    tests = sorted({test for defect in defects for test in defect.tests})
    verdicts = copies.map(lambda root, test: run_tests(root, [test]), tests)
    verdicts += copies.map(run_seeds, [num_seeds])
    sound = True
    for who, verdict in zip([*tests, "seeds"], verdicts, strict=True):
        if verdict not in (Verdict.PASSED, Verdict.NOT_ASKED):
            print(f"without any defect: {who} {verdict}", file=sys.stderr)
            sound = False
    return sound


def _judge(root: Path, defect: Defect, num_seeds: int) -> dict[str, object]:
    """Return a row of the table, and print it."""
    with planted_in(defect, root):
        by_tests, by_seeds = run_tests(root, defect.tests), run_seeds(root, num_seeds)
    is_caught = by_tests.is_noticed or by_seeds.is_noticed
    word = "caught  " if is_caught else "SURVIVED"
    print(f"{word} tests {by_tests}, seeds {by_seeds}: {defect.name}", flush=True)
    return {
        "defect": defect.name,
        "file": defect.path,
        "tests": list(defect.tests),
        "by_tests": by_tests,
        "by_seeds": by_seeds,
        "caught": is_caught,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
