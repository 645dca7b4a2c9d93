"""What this process may use of its machine: cores and memory, by the kernel's account and cgroups'.

Rules: a limit of any group above counts too, in v1 and v2, wherever the hierarchy is mounted. What
a group uses is what it could not give back: cached files that are not in use count as free. A
file that is missing or says nothing sets no limit. Must not know: what cores and memory are for.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

UNLIMITED = 2**63
ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class _Names:
    """The files of a memory group, which the two versions of cgroups name differently."""

    limits: tuple[str, ...]
    usage: str
    inactive: str  # the field of memory.stat
    limit_above: str  # the field of memory.stat with the least limit of the groups above


_V1 = _Names(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "total_inactive_file",
    "hierarchical_memory_limit",
)
_V2 = _Names(("memory.max", "memory.high"), "memory.current", "inactive_file", "")


def num_cores(root: Path = ROOT) -> int:
    """Return the cores that this process may use: those it may run on, and no more than its quota.

    A quota of a core and a half is one core: two busy threads would be stopped half the time.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    for group, is_v2 in _groups("cpu", root):
        if is_v2:
            quota, _, period = _read(group / "cpu.max").partition(" ")
        else:
            quota, period = (_read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def cpu_name(root: Path = ROOT) -> str:
    """Return the marketing name of the processor, as far as the system tells."""
    for line in _read(root / "proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_memory(root: Path = ROOT) -> int:
    """Return the bytes that this process may still take."""
    available = UNLIMITED
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for group, is_v2 in _groups("memory", root):
        available = min(available, _memory_left(group, _V2 if is_v2 else _V1))
    return available


def _memory_left(group: Path, names: _Names) -> int:
    """Return the bytes that a group may still take."""
    stat = dict(line.split(" ", 1) for line in _read(group / "memory.stat").splitlines())
    limits = [_read(group / name) for name in names.limits]
    limits.append(stat.get(names.limit_above, ""))
    limit = min((int(text) for text in limits if text.isdecimal()), default=UNLIMITED)
    usage = _read(group / names.usage)
    if not usage.isdecimal():
        return limit
    used = int(usage) - int(stat.get(names.inactive, 0))
    return max(limit - max(used, 0), 0)


def _groups(controller: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the groups of this process that may limit a controller, and whether they are v2."""
    paths = _own_paths(root)
    for line in _read(root / "proc/self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        shown, mounted = (PurePosixPath(_unescape(text)) for text in fields.split()[3:5])
        kind, _, options = rest.split(" ", 2)
        if kind == "cgroup2":
            path, is_v2 = paths.get(""), True
        elif kind == "cgroup" and controller in options.split(","):
            path, is_v2 = paths.get(controller), False
        else:
            continue
        top = root / mounted.relative_to("/")
        # In a container's own namespace, or where only its group is mounted, paths may lie outside
        # of what is seen: the group is then the mount itself.
        is_inside = path is not None and path.is_relative_to(shown) and ".." not in path.parts
        group = top / path.relative_to(shown) if path is not None and is_inside else top
        while True:
            yield group, is_v2
            if group == top:
                break
            group = group.parent


def _own_paths(root: Path) -> dict[str, PurePosixPath]:
    """Return the path of this process' group by controller; that of v2 by an empty name."""
    paths: dict[str, PurePosixPath] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            paths[controller] = PurePosixPath(path)
    return paths


def _unescape(text: str) -> str:
    """Return a path of mountinfo, where blanks are written in octal."""
    return text.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def _read(path: Path) -> str:
    """Return the text of a file of the kernel's, "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # no such file, or not for this user: nothing is known
        return ""
