"""Reads a file that holds one JSON object.

Must not know: what is in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastserve.settings.option import ConfigError


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the object in a UTF-8 JSON file; None if there is no such file.

    Raises ConfigError, in one line that names the file, for what is no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: must hold a JSON object, and holds one of type {type(content).__name__}"
        )
    return content
