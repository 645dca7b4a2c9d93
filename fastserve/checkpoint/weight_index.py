"""Reads the index of a checkpoint that is cut into files: safetensors, or pickles to convert.

Must not know: what is in the files.
"""

from __future__ import annotations

import json
from pathlib import Path

from fastserve.settings.option import ConfigError


def indexed_files(index: Path) -> list[Path]:
    """Return the files that an index names, which must be there and lie beside it."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{index}: cannot be read: {error!r}") from None
    paths = sorted(index.parent / str(name) for name in names)
    for path in paths:
        if path.parent != index.parent:
            raise ConfigError(f"{index}: names a file outside the model's directory: {path}")
        if not path.is_file():
            raise ConfigError(
                f"{index.parent}: the shard {path.name} named by the index is missing"
            )
    return paths
