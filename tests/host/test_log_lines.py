"""The lines of the log: one a message, whatever is in it."""

from __future__ import annotations

import io
import logging

import pytest

from fastserve.host.log_lines import LineFormatter, one_line

FORGED = "2026-01-01 00:00:00 INFO POST /v1/completions 200 1.0 ms forged"


def logged(message: str, *args: object, error: Exception | None = None) -> list[str]:
    """Return the lines that one message makes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter())
    record = logging.LogRecord("x", logging.INFO, "x", 1, message, args, None)
    if error is not None:
        record.exc_info = (type(error), error, error.__traceback__)
    handler.handle(record)
    return stream.getvalue().removesuffix("\n").split("\n")


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\v", "\f", "\x85", "\u2028", "\u2029"])
def test_a_message_is_one_line(end: str) -> None:
    """Whatever ends a line somewhere is shown as its escape."""
    [line] = logged("the model %s is not here", f"x{end}{FORGED}")
    assert line.splitlines() == [line]
    assert FORGED in line
    assert not line.startswith(FORGED)


@pytest.mark.parametrize("char", ["\x1b", "\0", "\x7f", "\x9b", "\u202e", "\u2066"])
def test_what_moves_the_cursor_or_turns_the_text_is_shown(char: str) -> None:
    """A terminal shows what is there."""
    [line] = logged("a%sb", char)
    assert char not in line
    assert ascii(char)[1:-1] in line


def test_letters_of_all_scripts_stay() -> None:
    """They are no danger."""
    assert one_line("naïve 模型 🙂 'x' \\n") == "naïve 模型 🙂 'x' \\n"


def test_a_traceback_forges_no_line() -> None:
    """Its lines have a mark, those too that an exception's own words begin."""
    try:
        raise ValueError(f"bad\n{FORGED}\r{FORGED}")
    except ValueError as error:
        first, *rest = logged("it failed", error=error)
    assert first.endswith("INFO it failed")
    assert len(rest) >= 4
    assert all(line.startswith("| ") for line in rest)
    assert any(FORGED in line for line in rest)
