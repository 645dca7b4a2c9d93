"""Where a figure comes from: commit, machine and command, written beside every result.

Rules: no dates, so that a rerun that changes nothing changes no file.
Must not know: what is measured.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from fastserve.host.machine import cpu_name, num_cores
from fastserve.settings.option import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def provenance(command: Sequence[str]) -> dict[str, object]:
    """Return {commit, machine, command} of a measurement."""
    return {"commit": commit(), "machine": machine(), "command": shlex.join(command)}


def output_path(name: str, flag: str = "--output") -> Path:
    """Return the path of a file to be written, its folder made.

    Raises ConfigError, naming the flag, if it cannot be written: better before a measurement than
    after it.
    """
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        if is_new or path.is_file() or path.is_dir():  # a pipe would wait for its reader
            path.open("ab").close()  # permissions alone do not tell: the file system may refuse
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{flag} {name}: cannot be written: {error.strerror}") from error
    return path


def write_result(path: Path, result: object) -> None:
    """Write a result as JSON; ConfigError if it cannot be."""
    try:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" where tracked files differ from it.

    None where the package was not installed from a checkout.
    """
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def machine() -> dict[str, object]:
    """Return what bounds a CPU measurement: processor, cores this process may use, memory."""
    return {
        "cpu": cpu_name(),
        "cores": num_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
