"""A cache directory of a benchmark's own: nothing measured or learned on another day is in it.

Must not know: what is measured.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fastserve.host.cache_dir import cache_dir


def use_new_cache(home: Path) -> None:
    """Let this process and its children keep what they keep in `home`.

    Kernels are copied there: they are the same on every day, and take half a minute to build.
    """
    kernels = list(cache_dir().glob("kernels-*"))
    os.environ["XDG_CACHE_HOME"] = str(home)
    cache_dir().mkdir()
    for file in kernels:
        shutil.copy2(file, cache_dir())


def forget_measurements() -> None:
    """Let the next engine measure and learn anew."""
    for kept in cache_dir().glob("*.json"):
        kept.unlink()
