"""Finding a model and reading what ends its texts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fastserve.checkpoint.locate import eos_token_ids, locate, public_name, sampling_defaults
from fastserve.settings.option import ConfigError


def write(directory: Path, **files: Any) -> Path:
    """Write JSON files; returns the directory."""
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def test_demo_is_the_bundled_model() -> None:
    """`demo` needs no network and has all that the tokenizer and the engine read."""
    directory = locate("demo")
    assert (directory / "config.json").is_file()
    assert (directory / "tokenizer.json").is_file()
    assert eos_token_ids(directory)


def test_a_directory_stays_where_it_is(tmp_path: Path) -> None:
    """A path is used as given, made absolute."""
    write(tmp_path, config={})
    assert locate(str(tmp_path)) == tmp_path.resolve()


@pytest.mark.parametrize("name", ["/no/such/place", "./nowhere", "a/b/c"])
def test_a_path_that_is_not_there_is_one_line(name: str) -> None:
    """Paths are never looked up on the hub."""
    with pytest.raises(ConfigError, match="no such directory") as caught:
        locate(name)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_config_is_no_model(tmp_path: Path) -> None:
    """The missing file is named."""
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        locate(str(tmp_path))
    write(tmp_path, config={})
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json or vocab\.json"):
        locate(str(tmp_path), holds=("tokenizer.json", "vocab.json"))


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "model.safetensors.index.json", "chat_template.jinja", "added_tokens.json",
    ],
)  # fmt: skip
@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_file_is_one_line(tmp_path: Path, name: str) -> None:
    """Whoever read it would wait until somebody wrote."""
    write(tmp_path, config={})
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=f"^{tmp_path / name}: a named pipe[^\n]*$"):
        locate(str(tmp_path))


def test_what_everybody_may_call_a_model(tmp_path: Path) -> None:
    """The name of its directory, through links too; a hub id as it is."""
    (tmp_path / "v1").mkdir()
    (tmp_path / "latest").symlink_to("v1")
    assert public_name(str(tmp_path / "latest")) == "v1"
    assert [public_name(name) for name in ("demo", "org/name", "/")] == ["demo", "org/name", "/"]


def test_a_name_that_cannot_be_on_the_hub_is_one_line() -> None:
    """A malformed hub id is told apart before any look-up."""
    with pytest.raises(ConfigError, match="neither a directory nor a hub id") as caught:
        locate("not a name!")
    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hub, an id that is not in the cache is a ConfigError."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="could not be fetched") as caught:
        locate("fastserve-tests/no-such-model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config": {"eos_token_id": 2}}, {2}),
        ({"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": [3, 4]}}, {3, 4}),
        ({"config": {"eos_token_id": [2]}, "generation_config": {}}, {2}),
        ({"config": {}}, set()),
        ({"config": {"eos_token_id": None}}, set()),
    ],
)
def test_ids_that_end_a_text(files: dict[str, Any], expected: set[int], tmp_path: Path) -> None:
    """generation_config.json wins over config.json; one id or several; none is allowed."""
    assert eos_token_ids(write(tmp_path, **files)) == expected


@pytest.mark.parametrize(
    ("files", "of_tokenizer", "expected"),
    [
        ({"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": 3}}, 4, {3, 4}),
        ({"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": [3, 4]}}, 4, {3, 4}),
        ({"config": {"eos_token_id": [2, 3]}}, 7, {2, 3, 7}),
        ({"config": {}}, 7, {7}),
        ({"config": {"eos_token_id": None}}, None, set()),
    ],
)
def test_either_end_ends_a_text(files, of_tokenizer, expected, tmp_path) -> None:
    """The model's files and its tokenizer may name different ids."""
    assert eos_token_ids(write(tmp_path, **files), of_tokenizer) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "opt"}, {2}),
        ({"model_type": "gpt2"}, {50256}),
        ({"model_type": "gpt2", "vocab_size": 199}, set()),
        ({"model_type": "qwen2"}, set()),
        ({"model_type": "llama", "eos_token_id": None}, set()),
        ({"model_type": "llama", "eos_token_id": [2, 500], "vocab_size": 400}, {2}),
    ],
)
def test_ends_that_no_file_names(config, expected, tmp_path) -> None:
    """The family's where config.json leaves them out; never one that cannot be drawn."""
    assert eos_token_ids(write(tmp_path, config=config)) == expected


@pytest.mark.parametrize("value", ["</s>", [1, "x"], -1, True])
def test_ids_that_are_none_are_refused(value: object, tmp_path: Path) -> None:
    """What is not an id is named with its file."""
    with pytest.raises(ConfigError, match=r"config\.json: eos_token_id"):
        eos_token_ids(write(tmp_path, config={"eos_token_id": value}))


def test_sampling_defaults_have_our_names(tmp_path: Path) -> None:
    """Only what is set and known is taken; max_new_tokens is max_tokens."""
    content = {
        "temperature": 0.7, "top_p": None, "top_k": 20, "max_new_tokens": 9, "do_sample": True,
    }  # fmt: skip
    write(tmp_path, generation_config=content)
    assert sampling_defaults(tmp_path) == {"temperature": 0.7, "top_k": 20, "max_tokens": 9}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_k": 2.5}, "top_k must be a number"),
        ({"max_new_tokens": True}, "max_new_tokens must be a number"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_sampling_defaults_that_no_request_could_use(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """They are refused at the start, not in the answer to each request."""
    write(tmp_path, generation_config=content)
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {message}"):
        sampling_defaults(tmp_path)


def test_no_generation_config_means_no_defaults(tmp_path: Path) -> None:
    """The file is optional."""
    assert sampling_defaults(tmp_path) == {}


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_file_is_named(text: str, tmp_path: Path) -> None:
    """Text that is no JSON object is a ConfigError with the path."""
    (tmp_path / "generation_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        sampling_defaults(tmp_path)
