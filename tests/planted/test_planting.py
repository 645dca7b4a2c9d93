"""The table of defects fits the code, and who plants them tells those that survive."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fastserve.host.provenance import ROOT
from tests.planted.defects import DEFECTS, Defect
from tests.planted.planting import Verdict, planted, planted_in, run_tests

CODE = "def double(number):\n    return 2 * number\n"
TESTS = """\
from code_under_test import double

def test_double():
    assert double(2) == 4
"""


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_every_defect_can_be_planted(defect: Defect) -> None:
    """Its text stands in its file once, what comes of it can be read, its tests are there."""
    content = (ROOT / defect.path).read_text(encoding="utf-8")
    ast.parse(planted(defect, content))
    assert defect.tests
    for test in defect.tests:
        path, _, name = test.partition("::")
        assert name.partition("[")[0] in (ROOT / path).read_text(encoding="utf-8")


def test_no_defect_is_there_twice() -> None:
    """There are enough of them, each with a name of its own."""
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS) >= 25


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ("2 * number", "3 * number", Verdict.FAILED),
        ("2 * number", "number + 2", Verdict.PASSED),
        ("return 2 *", "return 2 !", Verdict.BROKEN),
    ],
)
def test_only_tests_that_fail_have_noticed(
    old: str, new: str, verdict: Verdict, tmp_path: Path
) -> None:
    """One that survives is told from one that is caught, and from one that cannot be read."""
    path = tmp_path / "code_under_test.py"
    path.write_text(CODE)
    (tmp_path / "test_it.py").write_text(TESTS)
    defect = Defect("a defect", "code_under_test.py", old, new, ("test_it.py",))
    with planted_in(defect, tmp_path):
        assert run_tests(tmp_path, defect.tests) is verdict
    assert path.read_text() == CODE
    assert verdict.is_noticed == (verdict is Verdict.FAILED)


def test_a_defect_that_no_longer_fits_is_refused() -> None:
    """Its text must be there, and once."""
    defect = Defect("a defect", "a.py", "x = 1", "x = 2", ("test_a.py",))
    assert planted(defect, "x = 1\n") == "x = 2\n"
    for content in ("x = 0\n", "x = 1\nx = 1\n"):
        with pytest.raises(ValueError, match=r"^a\.py: what is to be replaced stands there"):
            planted(defect, content)
