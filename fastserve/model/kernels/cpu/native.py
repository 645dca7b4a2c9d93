"""Builds kernels.cpp with the system's compiler, once per machine and version, and loads it.

Rules: a build is kept in the user's cache directory under a name that says what went into it; it
appears there by an atomic rename, so that processes that start together may all build. Compiled
for this machine's processor: never shipped. Must not know: what the kernels compute.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fastserve.host.cache_dir import cache_dir

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",  # otherwise square roots are calls
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-w",
)
BUILD_SECONDS = 120


class BuildError(Exception):
    """The kernels could not be built; the message is one line."""


def load_native(compilers: Sequence[str] = COMPILERS) -> ctypes.CDLL:
    """Return the library, building it where this machine has not yet."""
    compiler = next(filter(None, map(shutil.which, compilers)), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler ({', '.join(compilers)})")
    library = cache_dir() / f"kernels-{_fingerprint(compiler)}.so"
    if not library.exists():
        _build(compiler, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"cannot load {library}: {error}") from error


def _fingerprint(compiler: str) -> str:
    parts = [path.read_bytes() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    parts += [" ".join(FLAGS).encode(), _run((compiler, "--version"))]
    parts.append(_processor())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _processor() -> bytes:
    """Return what tells processors apart, as -march=native does."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return " ".join(platform.uname()).encode()
    kept = (b"model name", b"flags", b"Features", b"CPU part")
    return b"\n".join(sorted({line for line in lines if line.startswith(kept)}))


def _build(compiler: str, library: Path) -> None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as directory:
            built = Path(directory) / library.name
            _run((compiler, *FLAGS, str(SOURCE), "-o", str(built)))
            built.replace(library)
    except OSError as error:
        raise BuildError(f"cannot write {library.parent}: {error}") from error


def _run(command: Sequence[str]) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, timeout=BUILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        errors = done.stderr.decode(errors="replace").splitlines() or ["no message"]
        first = next((line for line in errors if "error" in line), errors[0])
        raise BuildError(f"{command[0]} exited with {done.returncode}: {first}")
    return done.stdout
