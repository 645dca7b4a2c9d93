"""The pipe between a benchmark and what it measures."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

import pytest

from benchmarks.contender import Contender, ContenderError
from benchmarks.process_cpu import PROC
from fastserve.host.provenance import ROOT

ADDER = """
    import os, sys
    from benchmarks.contender import serve

    def fail():
        print("no such thing", file=sys.stderr)
        os._exit(3)

    print("loaded", file=sys.stderr)
    serve({
        "add": lambda left, right: [print("noise"), {"sum": left + right}][1],
        "fail": fail,
    })
"""


def start(directory: Path, program: str = ADDER) -> Contender:
    """Start a contender that adds."""
    script = directory / "adder.py"
    script.write_text(textwrap.dedent(program))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return Contender("adder", (sys.executable, str(script)), directory, environment)


def test_what_is_printed_is_no_answer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Questions are answered in turn; what libraries print is seen elsewhere."""
    with start(tmp_path) as adder:
        assert adder.ask("add", left=1, right=2) == {"sum": 3}
        assert adder.ask("add", left=3, right=4) == {"sum": 7}
    assert capfd.readouterr().err.count("noise") == 2


def test_one_that_ends_early_is_named(tmp_path: Path) -> None:
    """With its exit code, and again however often it is asked."""
    with start(tmp_path) as adder:
        for _ in range(2):
            with pytest.raises(ContenderError, match=r"^adder ended with 3$"):
                adder.ask("fail")


@pytest.mark.skipif(not PROC.is_dir(), reason="Linux only")
def test_none_is_left_behind(tmp_path: Path) -> None:
    """Neither one that reads the end of its input, nor one that would go on for ever."""
    with start(tmp_path) as contender:
        contender.ask("add", left=0, right=0)
    assert not (PROC / str(contender.pid)).exists()
    forever = "while True: pass"
    with pytest.raises(KeyboardInterrupt), start(tmp_path, forever) as contender:  # noqa: PT012
        assert (PROC / str(contender.pid)).exists()
        raise KeyboardInterrupt
    assert not (PROC / str(contender.pid)).exists()
