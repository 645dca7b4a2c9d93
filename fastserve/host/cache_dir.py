"""Where this user's copies of what can be made again are kept: kernels, step times, experiments.

Rules: code is loaded from here, so no other user may be able to write it.
Must not know: what is in it.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

NOWHERE = Path(os.devnull, "fastserve")  # cannot be made, which every reader can do without


def cache_dir() -> Path:
    """Return the directory, which need not exist; it may be deleted at any time."""
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "fastserve"
    home = os.path.expanduser("~")
    return Path(home) / ".cache" / "fastserve" if home != "~" else _without_home()


def _without_home() -> Path:
    """Return a place for a user that has no home, as in a container under a number of its own."""
    try:
        directory = Path(tempfile.gettempdir()) / f"fastserve-{os.getuid()}"
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
    except OSError:
        return NOWHERE
    is_private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
    return directory if is_private and found.st_uid == os.getuid() else NOWHERE
