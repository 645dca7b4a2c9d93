"""The digest of a checkpoint: whether two hosts hold the same one, without reading all of it.

Rules: it covers each file of weights, and config.json, by name, size and content: all of a small
one, of a large one SAMPLES stretches of SAMPLE_BYTES spread evenly from its header to its end.
Training of any kind changes nearly every weight, so that two models of one shape differ in it; a
file in which only a few bytes were changed may not. Must not know: torch, what weights mean.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastserve.settings.option import ConfigError

SAMPLES = 64  # of one file: some ms from a disk, a second over a slow network
SAMPLE_BYTES = 4096
SHOWN = 16  # hexadecimal digits: what a line can hold


def digest(directory: Path, *, has_weights: bool = True) -> str:
    """Return SHOWN hexadecimal digits that tell one checkpoint from another.

    Raises ConfigError for files that cannot be read.
    """
    hashed = hashlib.sha256()
    patterns = ("config.json", "*.safetensors") if has_weights else ("config.json",)
    paths = sorted(path for pattern in patterns for path in directory.glob(pattern))
    try:
        for path in paths:
            size = path.stat().st_size
            hashed.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                for start in _starts(size):
                    file.seek(start)
                    hashed.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}") from error
    return hashed.hexdigest()[:SHOWN]


def _starts(size: int) -> list[int]:
    """Return where stretches begin: all there are in a small file, else some from end to end."""
    if size <= SAMPLES * SAMPLE_BYTES:
        return list(range(0, size, SAMPLE_BYTES))
    return [(size - SAMPLE_BYTES) * i // (SAMPLES - 1) for i in range(SAMPLES)]
