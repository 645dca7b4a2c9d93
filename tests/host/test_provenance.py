"""Where a figure comes from: the commit that its code is of."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fastserve.host.provenance import commit

FILES = (
    "benchmarks/results/a.json",
    "benchmarks/run.py",
    "docs/decisions/001.md",
    "fastserve/costs.json",
    "fastserve/results.py",
    "pyproject.toml",
    "README.md",
    "results/a.png",
)


def git(folder: Path, *words: str) -> str:
    """Return what git says there, without the settings of who runs this."""
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a checkout of one commit."""
    git(tmp_path, "init", "-q")
    for name in FILES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("as committed")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "All", "--no-verify")
    return tmp_path


@pytest.mark.parametrize(
    "name", ["benchmarks/run.py", "fastserve/costs.json", "fastserve/results.py", "pyproject.toml"]
)
def test_changed_code_is_dirty(checkout: Path, name: str) -> None:
    """What a figure may depend on differs from the commit: the commit alone does not tell it."""
    head = git(checkout, "rev-parse", "HEAD")[:12]
    assert commit(checkout) == head
    (checkout / name).write_text("otherwise")
    assert commit(checkout) == f"{head}-dirty"
    git(checkout, "add", name)
    assert commit(checkout) == f"{head}-dirty"
    (checkout / name).unlink()
    assert commit(checkout) == f"{head}-dirty"


def test_what_is_written_from_figures_is_not(checkout: Path) -> None:
    """Earlier results and the prose around them are no code."""
    written = [name for name in FILES if name.endswith(".md") or "results/" in name]
    assert len(written) == 4
    for name in written:
        (checkout / name).write_text("otherwise")
    assert set(git(checkout, "diff", "--name-only").split()) == set(written)
    assert commit(checkout) == git(checkout, "rev-parse", "HEAD")[:12]


def test_the_commit_of_another_checkout_is_not_told(checkout: Path) -> None:
    """Installed into a folder of somebody's repository, it is no checkout of ours."""
    assert commit(checkout / "fastserve") is None


def test_without_git_there_is_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without git measures all the same."""
    monkeypatch.setenv("PATH", "")
    assert commit(checkout) is None
