"""Servers that begin alike."""

from __future__ import annotations

from benchmarks.live_server import copied_cache


def test_what_a_server_writes_reaches_no_other(tmp_path):
    """A copy has all of the original, and is gone with all that was added to it."""
    (tmp_path / "fastserve").mkdir()
    (tmp_path / "fastserve" / "profile.json").write_text("{}")
    with copied_cache(tmp_path) as copy:
        assert (copy / "fastserve" / "profile.json").read_text() == "{}"
        (copy / "fastserve" / "learned.json").write_text("[1]")
    assert not copy.exists()
    with copied_cache(tmp_path) as copy:
        assert [path.name for path in (copy / "fastserve").iterdir()] == ["profile.json"]
