"""The digest of a checkpoint: equal for copies, different for other weights of the same shape."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastserve.checkpoint.digest import SAMPLE_BYTES, SAMPLES, digest

LARGE = 4 * SAMPLES * SAMPLE_BYTES


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint of a small and a large file, whose content means nothing."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "model-1.safetensors").write_bytes(bytes(1000))
    (made / "model-2.safetensors").write_bytes(bytes(LARGE))
    return made


def change(path: Path, start: int, num_bytes: int = 1) -> None:
    """Turn zeros of a file into ones."""
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\1" * num_bytes)


def test_a_copy_elsewhere_has_the_same_digest(directory: Path, tmp_path: Path) -> None:
    """Neither where it lies nor what else lies beside it counts."""
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    (copy / "README.md").write_text("a copy")
    assert digest(copy) == digest(directory)


@pytest.mark.parametrize(
    ("name", "start", "num_bytes"),
    [
        ("config.json", 3, 1),
        ("model-1.safetensors", 999, 1),
        ("model-2.safetensors", 0, 1),  # its header
        ("model-2.safetensors", LARGE - 1, 1),
        ("model-2.safetensors", LARGE // 2, 5 * SAMPLE_BYTES),
        ("model-2.safetensors", LARGE, 1),  # longer
    ],
)
def test_what_changed_changes_it(directory: Path, name: str, start: int, num_bytes: int) -> None:
    """Every byte of a small file counts, and every stretch of some length of a large one."""
    before = digest(directory)
    change(directory / name, start, num_bytes)
    assert digest(directory) != before


def test_names_count_and_weights_only_where_there_are_any(directory: Path) -> None:
    """A file under another name is another checkpoint; random weights have no files."""
    before, without_weights = digest(directory), digest(directory, has_weights=False)
    (directory / "model-1.safetensors").rename(directory / "model-3.safetensors")
    assert digest(directory) != before
    assert digest(directory, has_weights=False) == without_weights != before
