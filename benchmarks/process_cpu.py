"""Other processes as Linux tells of them: whose they are, and their processor time."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Stat(NamedTuple):
    """What one line of /proc says of a process."""

    state: str  # a letter; Z: it has ended, and its parent has not asked how
    parent: int
    cpu_s: float  # of all its threads, those that ended too


def stat_of(line: str, ticks_per_s: int) -> Stat:
    """Read the content of /proc/PID/stat; the name in it may hold spaces and brackets."""
    fields = line.rpartition(")")[2].split()
    return Stat(fields[0], int(fields[1]), (int(fields[11]) + int(fields[12])) / ticks_per_s)


def read_stat(pid: int) -> Stat:
    """Return what /proc says of a process. Raises OSError when there is none of that number."""
    return stat_of((PROC / str(pid) / "stat").read_text(), os.sysconf("SC_CLK_TCK"))


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the processor time that these processes have taken, to a tick (10 ms)."""
    return sum(read_stat(pid).cpu_s for pid in pids)


def children_of(pid: int) -> list[int]:
    """Return the processes that this one has started and that live, in ascending order."""
    children = []
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = read_stat(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended since the folder was listed
        if stat.parent == pid and stat.state != "Z":
            children.append(int(entry.name))
    return sorted(children)


def engine_of(server: int) -> int:
    """Return the engine's process among the children of a server, which renders in others.

    Raises ValueError unless there is exactly one.
    """
    (engine,) = (pid for pid in children_of(server) if b"--engine-fd" in _command_of(pid))
    return engine


def _command_of(pid: int) -> bytes:
    """Return the command line of a process; empty when there is none of that number."""
    try:
        return (PROC / str(pid) / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
