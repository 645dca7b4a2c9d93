"""Models in the hub's cache, made here by hand: nothing is ever fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastserve.checkpoint.hub import missing_files
from fastserve.checkpoint.locate import locate
from fastserve.settings.option import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEEDED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """Return an empty cache, with the hub out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put(cache: Path, present: set[str], listed: set[str] | None) -> Path:
    """Write a snapshot of org/name, and the list of files of its commit; returns the snapshot."""
    repo = cache / "models--org--name"
    snapshot = repo / "snapshots" / COMMIT
    for path in (repo / "refs", repo / "trees", snapshot):
        path.mkdir(parents=True, exist_ok=True)
    (repo / "refs/main").write_text(COMMIT)
    for name in present:
        (snapshot / name).write_text("{}")
    if listed is not None:
        files = {name: {"size": 2, "blob_id": "0"} for name in listed}
        tree = {"format_version": 1, "files": files}
        (repo / f"trees/{COMMIT}.json").write_text(json.dumps(tree))
    return snapshot


@pytest.mark.parametrize(
    "others",
    [
        set(),
        {"README.md", ".gitattributes", "pytorch_model.bin"},
        {"onnx/config.json", "original/consolidated.safetensors"},
        {"preprocessor_config.json", "trainer_state.json", "params.json", "vocab.json"},
        {"consolidated.safetensors", "model.fp16.safetensors"},
    ],
)
def test_a_cached_model_is_served_whatever_else_the_repository_lists(others, cache):
    """HF_HUB_OFFLINE with all that is read in the cache, and a list that names more."""
    snapshot = put(cache, NEEDED, NEEDED | others)
    assert locate("org/name") == snapshot


def test_a_cached_model_without_a_list_is_served(cache):
    """As clients before version 2 left it."""
    snapshot = put(cache, NEEDED, None)
    assert locate("org/name") == snapshot


@pytest.mark.parametrize("name", sorted(NEEDED - {"config.json"} | {"generation_config.json"}))
def test_a_cached_model_that_lacks_a_file_is_refused(name, cache):
    """It would run as another model; the file is named in a short line."""
    put(cache, NEEDED - {name}, NEEDED | {name})
    with pytest.raises(ConfigError) as caught:
        locate("org/name")
    assert str(caught.value).endswith(
        f"its copy in the cache lacks {name}, and HF_HUB_OFFLINE is set"
    )
    assert len(str(caught.value).split()) < 25


def test_a_tokenizer_needs_no_weights(cache):
    """`--tokenizer org/name` takes the small files alone."""
    snapshot = put(cache, NEEDED - {"model.safetensors"}, NEEDED)
    assert locate("org/name", holds=("tokenizer.json", "vocab.json")) == snapshot


@pytest.mark.parametrize(
    ("present", "listed", "missing"),
    [
        ({"model.safetensors.index.json"}, {"model.safetensors.index.json"}, []),
        (
            set(),
            {"model.safetensors.index.json", "a.safetensors"},
            ["model.safetensors.index.json"],
        ),
        (set(), {"a.safetensors", "consolidated.safetensors"}, ["a.safetensors"]),
        (set(), {"vocab.json", "merges.txt"}, ["merges.txt", "vocab.json"]),
        ({"tokenizer.json"}, {"tokenizer.json", "vocab.json", "merges.txt"}, []),
    ],
)
def test_what_is_read(present, listed, missing, tmp_path):
    """Either kind of tokenizer, and either layout of the weights."""
    for name in present:
        (tmp_path / name).write_text("")
    assert missing_files(tmp_path, listed, has_weights=True) == missing


def test_a_model_that_is_not_cached_is_a_short_line(cache):
    """Not the client's sixty words."""
    with pytest.raises(ConfigError, match="could not be fetched") as caught:
        locate("org/name")
    assert str(caught.value).endswith("it is not in the cache, and HF_HUB_OFFLINE is set")
    assert len(str(caught.value).split()) < 25
