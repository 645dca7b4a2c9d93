"""The cluster secret: where it comes from, what it proves, what it never shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.settings.option import ConfigError
from fastserve.wire.cluster_secret import VARIABLE, ClusterSecret

SECRET = ClusterSecret(b"a secret of these tests")


def test_a_file_goes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both read the same secret, and what surrounds it in the file does not count."""
    monkeypatch.setenv(VARIABLE, "from the environment")
    file = tmp_path / "secret"
    file.write_text("  from the file, long enough\n")
    of_file, of_environment = ClusterSecret.read(str(file)), ClusterSecret.read(None)
    assert of_file is not None
    assert of_environment is not None
    assert of_file.reveal() == "from the file, long enough"
    assert of_environment.reveal() == "from the environment"


def test_none_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without it, or with an empty one, has none."""
    monkeypatch.delenv(VARIABLE, raising=False)
    assert ClusterSecret.read(None) is None
    monkeypatch.setenv(VARIABLE, "")
    assert ClusterSecret.read(None) is None


def test_a_short_one_and_a_missing_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line names where it came from, and does not repeat it."""
    monkeypatch.setenv(VARIABLE, "hunter2")
    with pytest.raises(ConfigError, match=f"{VARIABLE}: 7 bytes; a secret has 16") as refusal:
        ClusterSecret.read(None)
    assert "hunter2" not in str(refusal.value)
    with pytest.raises(ConfigError, match=r"--cluster-secret-file .*: No such file"):
        ClusterSecret.read(str(tmp_path / "missing"))


def test_a_proof_serves_one_role_and_one_connection() -> None:
    """Another secret, another role and another drawing prove something else."""
    proof = SECRET.prove(b"rank", b"drawn")
    assert SECRET.is_proved(proof, b"rank", b"drawn")
    assert not SECRET.is_proved(proof, b"engine", b"drawn")
    assert not SECRET.is_proved(proof, b"rank", b"drawn again")
    assert not ClusterSecret.draw().is_proved(proof, b"rank", b"drawn")


def test_two_that_are_drawn_differ_and_none_is_shown() -> None:
    """What is drawn is new each time, and no repr tells it."""
    first, second = ClusterSecret.draw(), ClusterSecret.draw()
    assert first.reveal() != second.reveal()
    assert first.reveal() not in repr(first)
