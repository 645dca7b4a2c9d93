"""Coverage is measured where it counts, and nowhere else: in threads and processes too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests import measured_rooms
from tests.measured_rooms import ROOMS

CODE = "def {name}():\n    return 1\n"
TEST = """
import subprocess, sys, threading
import pytest
from code_under_test import {name}, {name}_thread, {name}_child

{marks}
def test_it():
    assert {name}()
    thread = threading.Thread(target={name}_thread)
    thread.start()
    thread.join()
    call = "from code_under_test import {name}_child; {name}_child()"
    subprocess.run([sys.executable, "-c", call], check=True)
"""
PLACES = {"other": "other", "core": "core", "repeats": "core", "server": "server"}
SETTINGS = """
[run]
branch = true
source = code_under_test
parallel = true
patch = subprocess
disable_warnings = module-not-imported, no-data-collected
"""


def test_the_rooms_are_there() -> None:
    """One that was renamed would be left out unseen."""
    assert all(room.is_dir() for room in ROOMS)


def test_what_other_tests_reach_does_not_count(tmp_path: Path) -> None:
    """Those that count run between others, in the same process."""
    for name, room in PLACES.items():
        (tmp_path / "tests" / room).mkdir(parents=True, exist_ok=True)
        marks = "@pytest.mark.no_cover" if name == "repeats" else ""
        test = tmp_path / "tests" / room / f"test_{name}.py"
        test.write_text(TEST.format(name=name, marks=marks))
    for package in ("tests", *(f"tests/{room}" for room in PLACES.values())):
        (tmp_path / package / "__init__.py").touch()
    shutil.copy(measured_rooms.__file__, tmp_path / "tests")
    names = [name + suffix for name in PLACES for suffix in ("", "_thread", "_child")]
    (tmp_path / "code_under_test.py").write_text("\n\n".join(CODE.format(name=n) for n in names))
    (tmp_path / "settings").write_text(SETTINGS)

    def run(*words: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "coverage", *words],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(tmp_path),
                "COVERAGE_FILE": str(tmp_path / "data"),
                "COVERAGE_RCFILE": str(tmp_path / "settings"),
            },
            check=True,
            capture_output=True,
        )

    tests = [f"tests/{room}/test_{name}.py" for name, room in PLACES.items()]
    run("run", "-m", "pytest", "-q", "-c", os.devnull, "-p", "tests.measured_rooms", *tests)
    run("combine", "--quiet")
    run("json", "-o", "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    functions = report["files"]["code_under_test.py"]["functions"]
    reached = {name for name in names if functions[name]["summary"]["covered_lines"]}
    assert reached == {
        room + suffix for room in ("core", "server") for suffix in ("", "_thread", "_child")
    }
