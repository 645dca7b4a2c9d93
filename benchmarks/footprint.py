"""What other processes take up, as Linux tells it. Must not know: what they do."""

from __future__ import annotations

import re
from typing import NamedTuple

from benchmarks.process_cpu import PROC


class Footprint(NamedTuple):
    """What a process takes up at one moment."""

    num_fds: int
    num_threads: int
    rss_bytes: int


def footprint(pid: int) -> Footprint:
    """Return what a process takes up. Raises OSError when there is none of that number."""
    directory = PROC / str(pid)
    num_fds = sum(1 for _ in (directory / "fd").iterdir())
    return read_status((directory / "status").read_text(), num_fds)


def read_status(text: str, num_fds: int) -> Footprint:
    """Read the content of /proc/PID/status."""
    values = dict(re.findall(r"^(Threads|VmRSS):\s+(\d+)", text, re.MULTILINE))
    return Footprint(num_fds, int(values["Threads"]), 1024 * int(values["VmRSS"]))
