"""Tokens that stand beside a vocabulary, in any of the files that may tell of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fastserve.settings.option import ConfigError
from fastserve.text.tokenizer import Tokenizer
from tests import tiny_tokenizers

FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
IMAGE = {"content": "<image>", "special": True, **FLAGS}
CALL = {"content": "<call>", "special": False, **FLAGS, "lstrip": True}
WIDE = {"content": "<|assistant|>", "special": True, **FLAGS, "lstrip": True, "rstrip": True}
TEXT = "a dog <image> <call> x <|assistant|> y <image></s>"
# What tokenizer_config.json says beside what is in tokenizer.json, and added_tokens.json.
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "added_tokens_decoder alone": ({"added_tokens_decoder": {"300": IMAGE, "301": CALL}}, {}),
    "other flags than in tokenizer.json": ({"added_tokens_decoder": {"3": WIDE}}, {}),
    "a named token with flags": (
        {"added_tokens_decoder": {"3": WIDE}, "eos_token": "<|assistant|>"},
        {},
    ),
    "added_tokens.json": ({}, {"<image>": 300}),
    "extra by name": (
        {
            "added_tokens_decoder": {"300": {**IMAGE, "special": False}},
            "extra_special_tokens": {"image_token": "<image>"},
        },
        {},
    ),
    "extra in a list": (
        {
            "added_tokens_decoder": {"300": {**IMAGE, "special": False}},
            "extra_special_tokens": ["<image>"],
        },
        {},
    ),
    "additional in a list": (
        {"added_tokens_decoder": {"300": IMAGE}, "additional_special_tokens": ["<image>", "</s>"]},
        {},
    ),
    "a name at the top": ({"added_tokens_decoder": {"300": IMAGE}, "image_token": "<image>"}, {}),
}


def write(directory: Path, settings: dict[str, Any], added: dict[str, int]) -> Path:
    """Write a tokenizer with 300 tokens and what the files beside it say."""
    tiny_tokenizers.save(tiny_tokenizers.byte_level(), directory)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    if added:
        (directory / "added_tokens.json").write_text(json.dumps(added))
    return directory


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_transformers(name, tmp_path):
    """The same ids of a text, and the same text back with and without special tokens."""
    write(tmp_path, *CASES[name])
    ours, oracle = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode(TEXT)
    assert ids == oracle.encode(TEXT)
    assert ours.vocab_size == len(oracle)
    assert ours.special_ids >= set(oracle.all_special_ids)
    assert ours.decode(ids, False) == oracle.decode(ids)
    if "image" in name or "extra" not in name:
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["extra by name", "a name at the top"])
def test_a_template_knows_a_models_own_tokens_by_name(name, tmp_path):
    """`image_token` beside `bos_token`."""
    settings, added = CASES[name]
    write(tmp_path, settings, added)
    tokenizer = Tokenizer.load(tmp_path, "{{ bos_token }}{{ image_token }}")
    prompt = tokenizer.encode_chat([{"role": "user", "content": "x"}])
    assert prompt == ("<s><image>", [0, 300])
    assert 300 in tokenizer.special_ids


def test_a_list_of_extra_tokens_has_no_names(tmp_path):
    """They are special all the same."""
    tokenizer = Tokenizer.load(write(tmp_path, *CASES["extra in a list"]))
    assert 300 in tokenizer.special_ids
    assert tokenizer.decode([68, 300]) == tokenizer.decode([68])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"added_tokens_decoder": {"310": IMAGE}}, "'<image>' cannot have the id 310"),
        ({"added_tokens_decoder": {"x": IMAGE}}, "special tokens cannot be read"),
        ({"added_tokens_decoder": {"300": "<image>"}}, "special tokens cannot be read"),
        ({"extra_special_tokens": {"image_token": {"text": "x"}}}, "special tokens cannot be read"),
    ],
)
def test_tokens_that_cannot_be_are_refused(settings, message, tmp_path):
    """In one line, not by other ids than were trained."""
    with pytest.raises(ConfigError, match=message) as caught:
        Tokenizer.load(write(tmp_path, settings, {}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1),
        ({"eos_token": None}, None),
        ({"eos_token": "<|assistant|>"}, 3),
        ({"eos_token": "<image>", "added_tokens_decoder": {"300": IMAGE}}, 300),
        ({"eos_token": "t"}, 87),
        ({"eos_token": "<nowhere>"}, None),
    ],
)
def test_the_end_of_a_text_is_found_without_the_vocabulary(settings, expected, tmp_path):
    """The id that the loaded tokenizer has: of an added token, or of a word of the vocabulary."""
    write(tmp_path, settings, {})
    assert Tokenizer.find_eos(tmp_path) == Tokenizer.load(tmp_path).eos_token_id == expected


def test_a_directory_without_tokenizer_has_no_end(tmp_path):
    """Prompts are token ids there."""
    assert Tokenizer.find_eos(tmp_path) is None


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "spiece.model", "tekken.json", "qwen.tiktoken", "vocab.txt"]
)
def test_another_format_is_named_with_the_way_out(name, tmp_path):
    """tokenizer.model without tokenizer.json: what is missing, and what writes it."""
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"neither tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    format_ = name if name in ("tokenizer.model", "tekken.json", "vocab.txt") else Path(name).suffix
    assert f"{format_} is not read" in str(caught.value)
    assert "save_pretrained" in str(caught.value)
    assert "\n" not in str(caught.value)
