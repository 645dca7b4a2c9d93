"""`fastserve reproduce`: runs the experiments of a source checkout.

Rules: an experiment is a file experiments/eN_name.py with `run(lab)`, and its docstring's first
line is what it is. Must not know: what any of them does.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fastserve.host.provenance import ROOT
from fastserve.host.terminal import make_table, print_table
from fastserve.settings.option import ConfigError

FOLDER = ROOT / "experiments"
FILE_NAME = re.compile(r"e(\d+)_\w+\.py")


def reproduce(
    names: Sequence[str], *, is_quick: bool, traces: str | None, output: str | None, workers: int
) -> int:
    """Run the named experiments, or list what there is."""
    files = find(FOLDER)
    if not names:
        print_table(as_table(files))
        return 0
    chosen = [choose(name, files) for name in names]
    if workers < 1:
        raise ConfigError(f"--workers: {workers} is below the minimum of 1")
    if output is not None:
        writable_folder(output)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    harness: Any = importlib.import_module("experiments.harness")
    lengths: Any = importlib.import_module("experiments.lengths")
    quick = ["--quick"] if is_quick else []
    for name in chosen:
        folder = output or (harness.cache_folder() / "quick" if is_quick else ROOT / "results")
        lab = harness.Lab(
            is_quick=is_quick,
            traces=lengths.traces_folder(traces),
            output=Path(folder),
            num_workers=workers,
            command=("fastserve", "reproduce", name, *quick),
        )
        importlib.import_module(f"experiments.{name}").run(lab)
    return 0


def writable_folder(name: str) -> None:
    """Make the folder of the results; ConfigError if none can be written there."""
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {name}: {error.strerror}") from error
    if not os.access(name, os.W_OK):
        raise ConfigError(f"--output {name}: cannot be written")


def find(folder: Path) -> dict[str, Path]:
    """Return the experiments of a folder by name, in the order of their numbers.

    Raises ConfigError where there is no checkout.
    """
    found = [path for path in folder.glob("e*.py") if FILE_NAME.fullmatch(path.name)]
    if not found:
        raise ConfigError(
            f"reproduce: no experiments in {folder}: they are in the source checkout, not in the "
            "installed package; clone the repository and install it with `pip install -e .`"
        )
    found.sort(key=lambda path: int(FILE_NAME.fullmatch(path.name)[1]))  # type: ignore[index]
    return {path.stem: path for path in found}


def choose(name: str, files: Mapping[str, Path]) -> str:
    """Return the experiment that is meant: `e2` will do."""
    for known in files:
        if name.lower() in (known, known.partition("_")[0]):
            return known
    raise ConfigError(f"reproduce: no experiment {name!r}; there are: {', '.join(files)}")


def as_table(files: Mapping[str, Path]) -> Table:
    """List the experiments with what they are."""
    table = make_table("experiment", "what it measures", title="fastserve reproduce EXPERIMENT …")
    for column in table.columns:
        column.justify = "left"
    for name, path in files.items():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        table.add_row(name, docstring.partition("\n")[0])
    return table
