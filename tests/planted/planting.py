"""Plants a defect in a copy of the tree and sees who notices.

Rules: the checkout is never written to. Only tests that ran and failed count, or that hung: a
copy that cannot be imported proves nothing. Must not know: which defects there are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from tests.planted.defects import Defect

TIMEOUT_S = 1800.0
SECOND_NS = 10**9
SOME_FAILED = 1  # what pytest and the command of the simulation exit with


class Verdict(StrEnum):
    """What some tests said."""

    PASSED = "passed"
    FAILED = "failed"
    HUNG = "hung"
    BROKEN = "could not be run"
    NOT_ASKED = "not asked"

    @property
    def is_noticed(self) -> bool:
        """Whether somebody who ran them would have known."""
        return self in (Verdict.FAILED, Verdict.HUNG)


def copy_tree(root: Path, target: Path) -> None:
    """Copy the tracked files of a checkout, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "fastserve", "tests", "pyproject.toml"],
        cwd=root,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in listed.stdout.split("\0"):
        if name and (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def planted(defect: Defect, content: str) -> str:
    """Return a file's content with a defect; ValueError unless its text is there exactly once."""
    count = content.count(defect.old)
    if count != 1:
        raise ValueError(f"{defect.path}: what is to be replaced stands there {count} times")
    return content.replace(defect.old, defect.new)


@contextmanager
def planted_in(defect: Defect, root: Path) -> Iterator[None]:
    """Have a defect in a copy for a while."""
    path = root / defect.path
    content = path.read_text(encoding="utf-8")
    _write(path, planted(defect, content))
    try:
        yield
    finally:
        _write(path, content)


def _write(path: Path, content: str) -> None:
    """Write a file that is seen to be younger: what was compiled of it counts no more."""
    written_ns = path.stat().st_mtime_ns
    path.write_text(content, encoding="utf-8")
    os.utime(path, ns=(written_ns + SECOND_NS, written_ns + SECOND_NS))


def run_tests(root: Path, tests: Sequence[str]) -> Verdict:
    """Run tests of a copy, to the first that fails."""
    # A test that is late on a busy machine has noticed nothing.
    options = ("-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", "--timeout", "0")
    return _run(root, "pytest", *options, *tests)


def run_seeds(root: Path, num_seeds: int) -> Verdict:
    """Run seeds of the simulation in a copy, to the first that fails; of none nothing is said."""
    if not num_seeds:
        return Verdict.NOT_ASKED
    return _run(root, "tests.dst.command", "-x", "--seeds", str(num_seeds))


def _run(root: Path, module: str, *arguments: str) -> Verdict:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=root,
            env=environment,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Verdict.HUNG
    if done.returncode == SOME_FAILED:
        return Verdict.FAILED
    return Verdict.BROKEN if done.returncode else Verdict.PASSED
