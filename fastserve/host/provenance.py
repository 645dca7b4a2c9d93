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
WRITTEN_FROM_FIGURES = (":(exclude,glob)**/results/**", ":(exclude,glob)**/*.md")


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


def commit(root: Path = ROOT) -> str | None:
    """Return the commit of the checkout at root, with "-dirty" where tracked code differs from it.

    Results and prose are no code: they are written from figures, and no figure is made from them,
    so that what one run has written does not make the next one doubtful. All else counts.
    None where root is no checkout, not even if it is a folder of one.
    """
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "diff", "--name-only", "HEAD", "--", ".", *WRITTEN_FROM_FIGURES)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head


def _git(root: Path, *words: str) -> str:
    """Return what git says in a checkout; raises as subprocess.run does."""
    found = subprocess.run(
        ["git", *words],
        cwd=root,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
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
