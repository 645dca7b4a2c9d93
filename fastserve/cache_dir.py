"""Where this user's copies of what can be made again are kept: kernels, step times, experiments.

Must not know: what is in it.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the directory, which need not exist; it may be deleted at any time."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fastserve"
