"""Where copies are kept."""

from __future__ import annotations

from pathlib import Path

from fastserve.cache_dir import cache_dir


def test_the_environment_decides(monkeypatch, tmp_path):
    """XDG_CACHE_HOME where it is set, else ~/.cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "fastserve"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == Path(tmp_path) / ".cache" / "fastserve"
