"""What people see of a run: whole lines in a pipe, whole figures in a narrow terminal."""

from __future__ import annotations

import pytest
from rich.console import Console

from fastserve.host.terminal import NARROW, make_bar, make_table, print_table, say


def test_a_line_stays_whole_in_a_pipe(capsys, monkeypatch):
    """However long it is, and brackets in it are text."""
    monkeypatch.setenv("COLUMNS", "20")
    say("wrote /models/[new]/" + "x" * 60)
    say("to stdout", stderr=False)
    assert capsys.readouterr() == ("to stdout\n", "wrote /models/[new]/" + "x" * 60 + "\n")


def test_a_line_breaks_between_words_at_a_terminal(capsys, monkeypatch):
    """Not within them, as terminals do."""
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    say("twelve requests of four tokens")
    assert capsys.readouterr().err.splitlines() == ["twelve requests of ", "four tokens"]


def test_a_bar_is_not_drawn_in_a_pipe(capsys):
    """Not even an empty line."""
    with make_bar() as bar:
        bar.add_task("x", total=1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("width", [32, 40, NARROW, 80])
def test_no_figure_is_cut_off(width):
    """A narrow table has no frame, and folds what is too long still."""
    headings = ("waiting", "running", "median", "p95", "max")
    table = make_table(*headings, title="of /models/[new]", width=width)
    table.add_row("10,000", "256", "0.123", "0.456", "1234567890.123")
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    said = capture.get()
    assert "…" not in said
    assert ("━" in said) is (width >= NARROW)
    assert max(map(len, said.splitlines())) <= width
    assert "/models/[new]" in " ".join(said.split())


def test_a_row_stays_whole_in_a_pipe(capsys, monkeypatch):
    """Whatever width is said of a terminal that is not there; at one it folds."""
    monkeypatch.setenv("COLUMNS", "80")
    table = make_table(*(f"a long heading {n}" for n in range(9)), title="wide")
    table.add_row(*(f"{n}0,000,000.123" for n in range(9)))
    print_table(table)
    row = capsys.readouterr().out.splitlines()[4]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        f"{n}0,000,000.123" for n in range(9)
    ]
    assert len(row) > 80
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_table(table)
    assert len(capsys.readouterr().out.splitlines()) > 8
