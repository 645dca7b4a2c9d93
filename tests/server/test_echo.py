"""Echoed prompts: offsets point into the text, whatever the tokenizer makes of it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from fastserve.server.echo import echo_of
from fastserve.server.prompts import Prompt
from fastserve.text.text_stream import REPLACEMENT
from fastserve.text.tokenizer import Tokenizer
from tests import tiny_tokenizers


def trimming() -> Backend:
    """Make a byte-level BPE whose spans leave out a token's own spaces (GPT-2, Llama 3)."""
    backend = tiny_tokenizers.byte_level()
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), backend.post_processor]
    )
    return backend


BACKENDS = {
    "adds-bos": tiny_tokenizers.byte_level(),
    "trims-spans": trimming(),
    "byte-fallback": tiny_tokenizers.byte_fallback(),
    "chatml": tiny_tokenizers.chatml(),
}
TOKENIZERS = {name: Tokenizer(backend, {}, None) for name, backend in BACKENDS.items()}
WORDS = Tokenizer(tiny_tokenizers.word_pieces(), {}, None)
TEXTS = [
    "the dog",
    "  the  dog \n\n jumps  ",
    " ",
    "<|im_start|>user\nhello<|im_end|>",
    "<s><s>the<|user|> dog</s>",
    "<|user|>",
    "x€y 😀😃 naïve 日本語",
    "the\u0301 e\u0301 ☃",
    "\t the",
]
any_text = st.text(st.characters(codec="utf-8", exclude_characters=REPLACEMENT), min_size=1)
any_tokenizer = st.sampled_from(sorted(TOKENIZERS))


def echoed(tokenizer: Tokenizer, prompt: Prompt, *, adds: bool = True, is_alone: bool = True):
    """Return the echo of a prompt."""
    return echo_of(prompt, tokenizer, adds_special_tokens=adds, is_alone=is_alone)


def pieces_of(text: str, offsets: list[int]) -> list[str]:
    """Cut a text where the offsets say."""
    return [text[a:b] for a, b in itertools.pairwise([*offsets, len(text)])]


def check_text(name: str, text: str, adds: bool) -> None:
    """Each whole-character token stands where the offsets say; tokens that were added take none."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, adds)
    if not ids:
        return
    echo = echoed(tokenizer, Prompt(ids, text), adds=adds)
    assert echo.text == text
    pieces = pieces_of(text, echo.offsets)
    assert "".join(pieces) == text
    assert echo.offsets == sorted(echo.offsets)
    num_added = len(ids) - len(tokenizer.encode(text, add_special_tokens=False))
    assert pieces[:num_added] == [""] * num_added
    for index, (token_id, piece) in enumerate(zip(ids, pieces, strict=True)):
        expected = tokenizer.token_text(token_id)
        if name == "byte-fallback" and piece != expected and not piece.startswith(" "):
            expected = expected.removeprefix(" ")  # where a text begins, the space was added
        if index >= num_added and REPLACEMENT not in expected:
            assert piece == expected


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_is_cut_into_its_tokens(name, text, adds):
    """With special tokens in the text or around it, spaces, characters of several tokens."""
    check_text(name, text, adds)


@given(any_tokenizer, any_text, st.booleans())
def test_any_text_is_cut_into_its_tokens(name, text, adds):
    """Of whatever characters."""
    check_text(name, text, adds)


def test_the_tokens_of_a_character_share_its_place():
    """The euro sign's three bytes begin where it does."""
    tokenizer = TOKENIZERS["chatml"]
    echo = echoed(tokenizer, Prompt(tokenizer.encode("x€y"), "x€y"))
    assert echo.offsets == [0, 1, 1, 1, 2]


def test_text_that_no_token_stands_for_belongs_to_the_token_before_it():
    """Spaces between words, case, unknown words, marks at both ends."""
    text = " The  DOGS, ☃ 5"
    echo = echoed(WORDS, Prompt(WORDS.encode(text), text))
    assert pieces_of(text, echo.offsets) == ["", " The ", " DOG", "S", ", ", "☃", " 5", ""]


@given(st.data(), st.booleans())
def test_ids_are_echoed_as_what_they_say(data, is_alone):
    """Valid UTF-8 or not; a character begun is left to the output, where there is one."""
    tokenizer = TOKENIZERS["adds-bos"]
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(any_id, min_size=1, max_size=30))
    echo = echoed(tokenizer, Prompt(ids), is_alone=is_alone)
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    if is_alone:
        assert echo.text == whole
    else:
        assert whole.startswith(echo.text)
        assert not whole[len(echo.text) :].strip(REPLACEMENT)
    assert "".join(pieces_of(echo.text, echo.offsets)) == echo.text
    assert echo.offsets[0] == 0
    assert echo.offsets == sorted(echo.offsets)


@given(any_tokenizer, any_text)
def test_ids_and_their_text_are_cut_alike(name, text):
    """Where decoding gives the text back."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    if ids and tokenizer.decode(ids, skip_special_tokens=False) == text:
        of_text = echoed(tokenizer, Prompt(ids, text), adds=False)
        of_ids = echoed(tokenizer, Prompt(ids))
        whole = [i for i, own in enumerate(ids) if REPLACEMENT not in tokenizer.token_text(own)]
        assert of_ids.text == of_text.text
        assert [of_ids.offsets[i] for i in whole] == [of_text.offsets[i] for i in whole]
