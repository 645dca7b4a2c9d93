"""The file of a journal: whole lines, whatever ended those who wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.engine.journal_file import CHUNK_BYTES, open_journal


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        (b"", b""),
        (b"one\n", b"one\n"),
        (b"one\ntwo", b"one\n"),
        (b"no line", b""),
        (b"one\n" + b"x" * (2 * CHUNK_BYTES), b"one\n"),
        (b"x" * CHUNK_BYTES + b"\n", b"x" * CHUNK_BYTES + b"\n"),
        (b"x" * CHUNK_BYTES, b""),
    ],
)
def test_what_is_left_of_a_line_is_cut_off(tmp_path: Path, before: bytes, kept: bytes) -> None:
    """It ended with the process that wrote it; what is written now begins a line."""
    path = tmp_path / "journal"
    path.write_bytes(before)
    with open_journal(path) as journal:
        journal.write("abort", 0.0, 1)
    assert path.read_bytes() == kept + b'["abort","0x0.0p+0",1]\n'


def test_a_file_that_is_not_there_is_begun(tmp_path: Path) -> None:
    """As any other; what is no file, such as a device, is written to as it is."""
    with open_journal(tmp_path / "journal") as journal:
        journal.write("abort", 0.0, 1)
    assert (tmp_path / "journal").read_bytes().count(b"\n") == 1
    with open_journal(Path("/dev/full")) as journal, pytest.raises(OSError, match="No space left"):
        journal.write("abort", 0.0, 1)
