"""The file of a journal: lines are appended, and a restarted engine's follow in the same file.

Rules: whole lines survive the death of whoever wrote them; what was left of a line then is cut off,
for a reader could make nothing of what follows it. What cannot be written is an OSError there and
then. Must not know: what is written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fastserve.core.journal import Journal

CHUNK_BYTES = 1 << 16


@contextlib.contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Append to a file; what could not be written was an error then, and is none at the end."""
    if path.is_file():
        cut_off_partial_line(path)
    file = path.open("a", buffering=1)
    try:
        yield Journal(file.write)
    finally:
        with contextlib.suppress(OSError):
            file.close()


def cut_off_partial_line(path: Path) -> None:
    """Cut off what follows the last end of a line."""
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        start, rest = end, b""
        while start and b"\n" not in rest:
            start = max(start - CHUNK_BYTES, 0)
            file.seek(start)
            rest = file.read(min(CHUNK_BYTES, end - start))
        whole = start + rest.rfind(b"\n") + 1
        if whole < end:
            file.truncate(whole)
