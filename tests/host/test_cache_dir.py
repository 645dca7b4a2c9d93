"""Where copies are kept."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from fastserve.host.cache_dir import NOWHERE, cache_dir


def test_the_environment_decides(monkeypatch, tmp_path):
    """XDG_CACHE_HOME where it is set, else ~/.cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "fastserve"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == Path(tmp_path) / ".cache" / "fastserve"


def test_without_a_home_a_private_directory_will_do(monkeypatch, tmp_path):
    """A user number without a home: this user's own folder among the temporary ones."""
    without_home(monkeypatch, tmp_path)
    directory = cache_dir()
    assert directory == tmp_path / f"fastserve-{os.getuid()}" == cache_dir()
    assert directory.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("kind", ["open to others", "a link", "a file"])
def test_a_directory_that_others_may_write_is_not_used(monkeypatch, tmp_path, kind):
    """Code is loaded from there: better none is kept."""
    without_home(monkeypatch, tmp_path)
    place = tmp_path / f"fastserve-{os.getuid()}"
    if kind == "a file":
        place.touch()
    elif kind == "a link":
        (tmp_path / "other").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "other")
    else:
        place.mkdir()
        place.chmod(0o777)
    assert cache_dir() == NOWHERE
    with pytest.raises(OSError, match="Not a directory"):
        cache_dir().mkdir(parents=True)


def without_home(monkeypatch, tmp_path):
    """Take HOME and the passwd entry away."""
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # which raises KeyError
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
