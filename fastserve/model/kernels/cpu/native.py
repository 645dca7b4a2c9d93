"""Builds kernels.cpp with the system's compiler, once per machine and version, and loads it.

Rules: a build is kept in the user's cache directory under a name that says what went into it and
what came out; it appears there by an atomic rename, so that processes that start together may all
build. One whose bytes are not what its name says was not written whole, and would end the process
that touches it: it is built again. Where none can be kept, it is built at every start. Compiled for
this machine's processor: never shipped. Must not know: what the kernels compute.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fastserve.host.cache_dir import cache_dir

logger = logging.getLogger(__name__)

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
    "-pthread",
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
    stem = f"kernels-{_fingerprint(compiler)}"
    kept = _find(cache_dir(), stem)
    if kept is not None:
        return _load(kept)
    with tempfile.TemporaryDirectory(prefix="fastserve-") as directory:
        built = Path(directory) / "kernels.so"
        _run((compiler, *FLAGS, str(SOURCE), "-o", str(built)))
        try:
            return _load(_keep(built, stem))
        except OSError as error:
            logger.warning("the CPU kernels are built at every start: %s", error)
            return _load(built)  # which may be deleted once it is mapped


def _find(directory: Path, stem: str) -> Path | None:
    """Return a whole build; those that are not are deleted."""
    found = None
    for path in directory.glob(f"{stem}-*.so"):
        try:
            if path.name == _name(stem, path.read_bytes()):
                found = path
            else:
                logger.warning("%s is not what was built, and is built again", path)
                path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s cannot be used: %s", path, error)
    return found


def _name(stem: str, content: bytes) -> str:
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:20]}.so"


def _keep(built: Path, stem: str) -> Path:
    """Put a build into the cache directory; OSError where there is no place for it."""
    content = built.read_bytes()
    directory = cache_dir()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as beside:
        copy = Path(beside) / "kernels.so"
        with copy.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return copy.replace(directory / _name(stem, content))


def _load(library: Path) -> ctypes.CDLL:
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
