"""Tokenizer against transformers' AutoTokenizer, on the demo model and on tokenizers made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fastserve.checkpoint.locate import BUNDLED
from fastserve.settings.option import ConfigError
from fastserve.text.tokenizer import Tokenizer
from tests import tiny_tokenizers

TEXTS = (
    "Hello, world",
    "",
    "  two  spaces ",
    "Ελληνικά 日本語 😀 €",
    "<s> in a text <|user|>",
    "a\n\tb" * 50,
    "x" * 5000,
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Größe? "},
    {"role": "assistant", "content": "2 m"},
    {"role": "user", "content": "€ 😀"},
]


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback", "demo"])
def model_dir(request, tmp_path_factory) -> Path:
    """A directory with a tokenizer."""
    if request.param == "demo":
        return BUNDLED
    directory = tmp_path_factory.mktemp(request.param)
    is_byte_level = request.param == "byte-level"
    backend = tiny_tokenizers.byte_level() if is_byte_level else tiny_tokenizers.byte_fallback()
    return tiny_tokenizers.save(backend, directory)


@pytest.fixture(scope="module")
def ours(model_dir) -> Tokenizer:
    """What is tested."""
    return Tokenizer.load(model_dir)


@pytest.fixture(scope="module")
def oracle(model_dir):
    """What it must agree with."""
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("adds", [True, False])
def test_encodes_and_decodes_as_transformers_does(ours, oracle, text, adds):
    """The same ids, and the same text back."""
    ids = ours.encode(text, add_special_tokens=adds)
    assert ids == oracle.encode(text, add_special_tokens=adds)
    for skips in (True, False):
        assert ours.decode(ids, skips) == oracle.decode(ids, skip_special_tokens=skips)


@pytest.mark.parametrize("adds", [True, False])
def test_renders_chats_as_transformers_does(ours, oracle, adds):
    """The same prompt text and ids."""
    text = oracle.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=adds)
    ids = oracle.apply_chat_template(MESSAGES, add_generation_prompt=adds, return_dict=False)
    assert ours.encode_chat(MESSAGES, add_generation_prompt=adds) == (text, ids)


def test_knows_the_special_tokens(ours, oracle):
    """Ids of the named ones, all special ids, the size of the vocabulary."""
    assert ours.bos_token_id == oracle.bos_token_id
    assert ours.eos_token_id == oracle.eos_token_id
    assert ours.special_ids >= set(oracle.all_special_ids)
    assert ours.vocab_size == len(oracle)


def test_bytes_of_tokens_make_the_bytes_of_the_text(ours):
    """Also where single tokens are no text."""
    ids = ours.encode("Größe 日本 😀 <s> x", add_special_tokens=False)
    text = ours.decode(ids, skip_special_tokens=False)
    assert b"".join(map(ours.token_bytes, ids)).strip() == text.encode()


def test_token_text_keeps_the_space_before_a_word(ours):
    """A word's leading space belongs to its token, though decoding it alone may drop it."""
    ids = ours.encode("a dog dog", add_special_tokens=False)
    assert "".join(map(ours.token_text, ids)).lstrip() == "a dog dog"


def test_unknown_ids_have_no_text(ours):
    """Models have more rows than tokenizers have tokens."""
    assert ours.id_to_token(10**6) is None
    assert ours.token_text(10**6) == ""
    assert ours.token_bytes(10**6) == b""


@pytest.mark.parametrize("text", ["\ud800", "x" * 5000 + "\udfff"])
def test_half_of_a_surrogate_pair_is_a_value_error(ours, text):
    """It is no Unicode text; short and long ones take different ways."""
    with pytest.raises(ValueError, match="lone surrogates"):
        ours.encode(text)


def test_a_directory_without_tokenizer_is_a_config_error(tmp_path):
    """In one line that names the file."""
    with pytest.raises(
        ConfigError, match=r"neither tokenizer\.json nor vocab\.json and merges\.txt"
    ):
        Tokenizer.load(tmp_path)


def test_a_broken_tokenizer_is_a_config_error(tmp_path):
    """Not whatever the library raises."""
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_broken_tokenizer_config_is_a_config_error(tmp_path, content):
    """The file is named."""
    tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ConfigError, match="tokenizer_config"):
        Tokenizer.load(tmp_path)


def test_template_of_the_user_wins_then_the_file_then_the_config(tmp_path):
    """--chat-template, chat_template.jinja, tokenizer_config.json, in this order."""
    tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path)

    def made(template: str | None = None) -> str:
        message = [{"role": "user", "content": "x"}]
        return Tokenizer.load(tmp_path, template).encode_chat(message).text

    assert "<|user|>" in made()
    (tmp_path / "chat_template.jinja").write_text("file")
    assert made() == "file"
    (tmp_path / "mine.jinja").write_text("mine")
    assert made(str(tmp_path / "mine.jinja")) == "mine"
    assert made("{{ 1 + 1 }}") == "2"


@pytest.mark.parametrize("has_files", [True, False])
def test_a_model_may_have_a_template_for_tools(tmp_path, has_files):
    """As files, or as a list of named templates; without one the default is for tools too."""
    tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path)
    others = tmp_path / "additional_chat_templates"
    listed = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
        5,
    ]
    if has_files:
        others.mkdir()
        (others / "tool_use.jinja").write_text("tools")
        (tmp_path / "chat_template.jinja").write_text("plain")
    else:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    tokenizer = Tokenizer.load(tmp_path)
    message = [{"role": "user", "content": "x"}]
    for tools, text in (([{"type": "function"}], "tools"), ([], "plain"), (None, "plain")):
        assert tokenizer.encode_chat(message, variables={"tools": tools}).text == text
    mine = Tokenizer.load(tmp_path, "{{ 'mine' }}")
    assert mine.encode_chat(message, variables={"tools": [{}]}).text == "mine"


def test_a_missing_template_file_is_a_config_error(tmp_path):
    """With the flag's name."""
    tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path)
    with pytest.raises(ConfigError, match="--chat-template"):
        Tokenizer.load(tmp_path, "nowhere.jinja")


def test_a_template_that_does_not_compile_is_a_config_error(tmp_path):
    """Known at start, not at the first request."""
    tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path)
    with pytest.raises(ConfigError, match="cannot be compiled"):
        Tokenizer.load(tmp_path, "{% if %}")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_file_that_cannot_be_read_is_one_line(name, tmp_path):
    """A failing disk, a file of another user's, or one that is no text."""
    directory = tiny_tokenizers.save(tiny_tokenizers.byte_level(), tmp_path)
    file = directory / name
    file.unlink(missing_ok=True)
    file.symlink_to("/proc/self/mem")  # a file that root may open too, and whose read fails
    with pytest.raises(ConfigError, match=rf"{name}: cannot be read: .*Input/output error"):
        Tokenizer.load(directory)
    file.unlink()
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=f"{name}: cannot be read"):
        Tokenizer.load(directory)
