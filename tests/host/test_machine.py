"""What this process may use: cgroups of both versions, in trees of files like the kernel's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastserve.host.machine import available_memory, num_cores

MIB = 2**20
V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MEMORY = "33 32 0:29 {root} /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory\n"
V1_CPU = "34 32 0:30 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
DISK = "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
FREE = {"proc/meminfo": f"MemTotal: 64 kB\nMemAvailable: {8 * 2**20} kB\n"}
NONE_V1 = "9223372036854771712"


def machine(tmp_path: Path, files: dict[str, str]) -> Path:
    """Write files of the kernel's under a root of their own."""
    for name, text in {**FREE, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return tmp_path


def v1(path: str, limit: int | str, usage: int, stat: str = "") -> dict[str, str]:
    """Return the memory files of a v1 group."""
    return {
        f"sys/fs/cgroup/memory{path}/memory.limit_in_bytes": str(limit),
        f"sys/fs/cgroup/memory{path}/memory.usage_in_bytes": str(usage),
        f"sys/fs/cgroup/memory{path}/memory.stat": stat,
    }


def v2(path: str, limit: int | str, usage: int, stat: str = "") -> dict[str, str]:
    """Return the memory files of a v2 group."""
    return {
        f"sys/fs/cgroup{path}/memory.max": str(limit),
        f"sys/fs/cgroup{path}/memory.current": str(usage),
        f"sys/fs/cgroup{path}/memory.stat": stat,
    }


def v1_process(path: str, root: str = "/") -> dict[str, str]:
    """Return what a process is told of its v1 groups."""
    return {
        "proc/self/cgroup": f"5:memory:{path}\n4:cpu,cpuacct:{path}\n1:name=systemd:{path}",
        "proc/self/mountinfo": DISK + V1_MEMORY.format(root=root) + V1_CPU.format(root=root),
    }


def v2_process(path: str, root: str = "/") -> dict[str, str]:
    """Return what a process is told of its v2 group."""
    return {"proc/self/cgroup": f"0::{path}", "proc/self/mountinfo": DISK + V2.format(root=root)}


CONTAINER = "/docker/0123"
MEMORY = {
    "no cgroups": ({}, 8 * 2**10),
    "v1 in a container whose group alone is mounted": (
        {**v1_process(CONTAINER, CONTAINER), **v1("", 700 * MIB, 200 * MIB)},
        500,
    ),
    "v1 in a namespace of its own": (
        {**v1_process("/", "/"), **v1("", 700 * MIB, 200 * MIB)},
        500,
    ),
    "v1 on the host": (
        {**v1_process("/a/b"), **v1("/a/b", 700 * MIB, 200 * MIB), **v1("", NONE_V1, 9 * MIB)},
        500,
    ),
    "v1: a group above has the limit": (
        {**v1_process("/a/b"), **v1("/a", 300 * MIB, 100 * MIB), **v1("/a/b", NONE_V1, 50 * MIB)},
        200,
    ),
    "v1: a group above that is not mounted has the limit": (
        {
            **v1_process(CONTAINER, CONTAINER),
            **v1("", NONE_V1, 50 * MIB, f"hierarchical_memory_limit {400 * MIB}"),
        },
        350,
    ),
    "v1: cached files can be given back": (
        {
            **v1_process("/", "/"),
            **v1("", 700 * MIB, 690 * MIB, f"cache 1\ntotal_inactive_file {300 * MIB}"),
        },
        310,
    ),
    "v1: unlimited": ({**v1_process("/"), **v1("", NONE_V1, 5 * MIB)}, 8 * 2**10),
    "v2 in a namespace of its own": (
        {**v2_process("/"), **v2("", 700 * MIB, 200 * MIB)},
        500,
    ),
    "v2 on the host": (
        {**v2_process("/a/b"), **v2("/a/b", 700 * MIB, 200 * MIB)},
        500,
    ),
    "v2: a group above has the limit": (
        {**v2_process("/a/b"), **v2("/a", 300 * MIB, 100 * MIB), **v2("/a/b", "max", 50 * MIB)},
        200,
    ),
    "v2: cached files can be given back": (
        {
            **v2_process("/"),
            **v2("", 700 * MIB, 690 * MIB, f"anon 7\ninactive_file {300 * MIB}"),
        },
        310,
    ),
    "v2: where a group is slowed down": (
        {
            **v2_process("/"),
            **v2("", "max", 100 * MIB),
            "sys/fs/cgroup/memory.high": str(400 * MIB),
        },
        300,
    ),
    "v2: unlimited": ({**v2_process("/"), **v2("", "max", 5 * MIB)}, 8 * 2**10),
    "v2: a group outside of what is mounted": (
        {**v2_process("/../other"), **v2("", 700 * MIB, 200 * MIB)},
        500,
    ),
    "v1 for memory beside an empty v2": (
        {
            "proc/self/cgroup": "5:memory:/a\n0::/a",
            "proc/self/mountinfo": V2.format(root="/").replace("cgroup rw", "cgroup/unified rw")
            + V1_MEMORY.format(root="/"),
            **v1("/a", 700 * MIB, 200 * MIB),
        },
        500,
    ),
    "more in use than allowed": ({**v1_process("/"), **v1("", 7 * MIB, 20 * MIB)}, 0),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_left(name, tmp_path):
    """The least of what the kernel has free and what any group above leaves."""
    files, mib = MEMORY[name]
    assert available_memory(machine(tmp_path, files)) == mib * MIB


QUOTAS = {
    "v1": (
        {
            **v1_process(CONTAINER, CONTAINER),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        1,
    ),
    "v1: none": (
        {
            **v1_process("/"),
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        4,
    ),
    "v2: above": ({**v2_process("/a/b"), "sys/fs/cgroup/a/cpu.max": "250000 100000"}, 2),
    "v2: less than a core": ({**v2_process("/"), "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
    "v2: none": ({**v2_process("/"), "sys/fs/cgroup/cpu.max": "max 100000"}, 4),
    "v2: more than there are": ({**v2_process("/"), "sys/fs/cgroup/cpu.max": "900000 100000"}, 4),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_cores(name, tmp_path, monkeypatch):
    """Those this process may run on, and no more than its quota pays for."""
    files, cores = QUOTAS[name]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert num_cores(machine(tmp_path, files)) == cores


def test_this_machine():
    """Something is left, less than an exabyte, and there is a core."""
    assert 0 < available_memory() < 2**60
    assert num_cores() >= 1
