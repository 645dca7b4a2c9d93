"""The command line that benchmarks share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.command import command_parser, names_of, origin, run_command
from benchmarks.contender import ContenderError
from fastserve.settings.option import ConfigError


def test_a_result_is_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says whose it is and which commit it was measured at."""
    file = tmp_path / "out.json"

    def show(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
        sys.stdout.write(f"{result['ratio']} of {args.rounds}\n")

    code = run_command(
        lambda: argparse.Namespace(output=file, rounds=3),
        lambda args: {**origin("mine"), "ratio": 1.5},
        show,
    )
    assert code == 0
    written = json.loads(file.read_text(encoding="utf-8"))
    assert (written["benchmark"], written["ratio"]) == ("mine", 1.5)
    assert written["commit"]
    assert capsys.readouterr().out == f"1.5 of 3\nwritten to {file}\n"


def test_a_result_may_only_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Where no file is named, none is written."""
    shown: list[Mapping[str, Any]] = []
    code = run_command(
        lambda: argparse.Namespace(output=None),
        lambda args: {"ratio": 1.5},
        lambda args, result: shown.append(result),
    )
    assert (code, shown, capsys.readouterr().out) == (0, [{"ratio": 1.5}], "")


@pytest.mark.parametrize("refusal", [ConfigError("--rounds: none"), ContenderError("it ended")])
def test_what_cannot_be_measured_is_one_line(
    refusal: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written, and nothing shown."""

    def refuse() -> argparse.Namespace:
        raise refusal

    def measure(args: argparse.Namespace) -> dict[str, Any]:
        raise AssertionError

    def show(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
        raise AssertionError

    assert run_command(refuse, measure, show) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {refusal}\n")


def test_help_is_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    """As it is laid out there."""
    with pytest.raises(SystemExit):
        command_parser("mine", "First.\n\n    indented").parse_args(["--help"])
    assert "python -m benchmarks.mine" in (told := capsys.readouterr().out)
    assert "First.\n\n    indented" in told


def test_only_known_names_are_taken() -> None:
    """In the order in which they are given; the others are named."""
    assert names_of("--kinds", "term,kill", ("kill", "stop", "term")) == ["term", "kill"]
    with pytest.raises(ConfigError, match="--kinds: there is no hang, nap"):
        names_of("--kinds", "nap,kill,hang", ("kill", "stop"))
