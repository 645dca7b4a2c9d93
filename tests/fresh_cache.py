"""A user's cache directory of a test's own.

Rules: nothing is in it but the CPU kernels, which the first test that asks has built where this
user keeps them: their build takes the longest of all, and is tested by itself.
Must not know: what a test will keep in it.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from fastserve.model.kernels.cpu.native import BuildError, load_native


def make_fresh_cache(root: Path) -> str:
    """Return `root`, made what XDG_CACHE_HOME may be set to."""
    made = root / "fastserve"
    made.mkdir(parents=True)
    with suppress(BuildError):  # there is no compiler, and nobody will have kernels
        shutil.copy2(load_native()._name, made)
    return str(root)
