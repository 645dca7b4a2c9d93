"""HFTokenizer against transformers' own: the same names, shapes, defaults and values."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fastserve.checkpoint.locate import BUNDLED
from fastserve.offline.hf_tokenizer import HFTokenizer
from fastserve.text.tokenizer import Tokenizer
from tests import chat_templates as templates
from tests import tiny_tokenizers

TEXTS = ["the dog", "", "Größe € 😀 <s>", "a much longer text, " * 5]
USER = {"role": "user", "content": "hi"}
CHATS = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "no "}],
]


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback", "demo"])
def model_dir(request, tmp_path_factory) -> Path:
    """A directory with a tokenizer."""
    if request.param == "demo":
        return BUNDLED
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "byte-fallback":
        return tiny_tokenizers.save(tiny_tokenizers.byte_fallback(), directory)
    backend = tiny_tokenizers.byte_level()
    backend.add_special_tokens(["<pad>"])
    backend.add_tokens(["dogs"])
    tiny_tokenizers.save(backend, directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {
        "pad_token": "<pad>",
        "unk_token": "<s>",
        "additional_special_tokens": ["<|user|>", "</s>"],
        "extra_special_tokens": {"image_token": "<|assistant|>"},
    }
    path.write_text(json.dumps(settings))
    return directory


@pytest.fixture
def ours(model_dir) -> HFTokenizer:
    """What is tested."""
    return HFTokenizer(Tokenizer.load(model_dir), str(model_dir), 4096)


@pytest.fixture
def oracle(model_dir):
    """What it must agree with."""
    return AutoTokenizer.from_pretrained(model_dir)


def same(ours: Any, theirs: Any) -> bool:
    """Whether two results have one type, as far as it is plain, one shape and one value."""
    if isinstance(theirs, np.ndarray | torch.Tensor):
        is_alike = type(ours) is type(theirs) and ours.dtype == theirs.dtype
        return is_alike and bool(ours.tolist() == theirs.tolist())
    if hasattr(theirs, "data") and hasattr(theirs, "items"):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in theirs)
    return bool(ours == theirs)


def test_attributes(ours, oracle):
    """What a tokenizer says of itself; a token that is not set is None."""
    names = (
        "bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "bos_token_id",
        "eos_token_id", "pad_token_id", "unk_token_id", "all_special_tokens", "all_special_ids",
        "special_tokens_map", "vocab_size", "vocab", "chat_template", "is_fast", "padding_side",
        "truncation_side", "name_or_path",
        *(name for name in ("image_token", "image_token_id") if hasattr(oracle, name)),
    )  # fmt: skip
    for name in names:
        assert getattr(ours, name) == getattr(oracle, name), name


def test_an_attribute_that_is_not_there(ours):
    """It is an AttributeError, as hasattr and copying need."""
    assert not hasattr(ours, "no_such_thing")
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = ours.no_such_thing


def test_the_vocabulary(ours, oracle):
    """Its size with added tokens, its ids, the added ones; and a tokenizer is never false."""
    assert len(ours) == len(oracle)
    assert bool(ours)
    assert ours.get_vocab() == oracle.get_vocab()
    assert ours.get_added_vocab() == oracle.get_added_vocab()
    assert {i: str(t) for i, t in ours.added_tokens_decoder.items()} == {
        i: str(t) for i, t in oracle.added_tokens_decoder.items()
    }
    assert ours.num_special_tokens_to_add() == oracle.num_special_tokens_to_add()


@pytest.mark.parametrize("options", [{}, {"add_special_tokens": False}])
def test_a_call_gives_ids_and_masks(ours, oracle, options):
    """Of one text or of several."""
    for text in (*TEXTS, TEXTS, TEXTS[:1]):
        assert same(ours(text, **options), oracle(text, **options))
        assert ours(text).input_ids == ours(text)["input_ids"]
    assert same(ours(tuple(TEXTS), **options), oracle(TEXTS, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": True},
        {"padding": "longest", "return_tensors": "np"},
        {"padding": True, "return_tensors": "pt"},
        {"padding": "max_length", "max_length": 9},
        {"truncation": True, "max_length": 3},
        {"truncation": True, "max_length": 3, "add_special_tokens": False},
        {"truncation": True, "max_length": 9, "padding": "max_length", "return_tensors": "np"},
        {"return_attention_mask": False},
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_truncation_and_tensors(ours, oracle, options, side):
    """With a pad token set as users do; on either side; for one text and for several."""
    for tokenizer in (ours, oracle):
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = tokenizer.truncation_side = side
    assert ours.pad_token_id == oracle.pad_token_id
    assert same(ours(TEXTS, **options), oracle(TEXTS, **options))
    assert same(ours(TEXTS[0], **options), oracle(TEXTS[0], **options))


def test_what_cannot_be_padded_or_made_a_tensor_is_refused(ours):
    """In words that say what to do."""
    ours.pad_token = None
    with pytest.raises(ValueError, match="pad_token"):
        ours(TEXTS, padding=True)
    with pytest.raises(ValueError, match="padding=True"):
        ours(TEXTS, return_tensors="np")
    with pytest.raises(ValueError, match="return_tensors"):
        ours(TEXTS, return_tensors="tf")


@pytest.mark.parametrize("text", TEXTS[1:3])
def test_encode_and_tokenize(ours, oracle, text):
    """Ids as a list, or as a tensor of one row; tokens without special ones."""
    assert ours.encode(text) == oracle.encode(text)
    assert ours.encode(text, add_special_tokens=False) == oracle.encode(
        text, add_special_tokens=False
    )
    assert ours.tokenize(text) == oracle.tokenize(text)
    assert ours.convert_tokens_to_string(ours.tokenize(text)) == oracle.convert_tokens_to_string(
        oracle.tokenize(text)
    )
    if text:
        made = ours.encode(text, return_tensors="pt")
        assert same(made, oracle.encode(text, return_tensors="pt"))


@pytest.mark.parametrize("skips", [True, False])
def test_decode_and_batch_decode(ours, oracle, skips):
    """An id, ids, lists of them, arrays and tensors; special tokens stay unless unwanted."""
    rows = oracle(TEXTS)["input_ids"]
    forms = [5, rows[0], tuple(rows[0]), rows, [], np.array(rows[0]), torch.tensor(rows[0]),
             torch.tensor([rows[0], rows[0]]), [np.int64(5), np.int64(6)]]  # fmt: skip
    for form in forms:
        expected = oracle.decode(form, skip_special_tokens=skips)
        assert ours.decode(form, skip_special_tokens=skips) == expected
    batches: list[Any] = [rows, [], torch.tensor([rows[0], rows[0]])]
    for batch in batches:
        expected = oracle.batch_decode(batch, skip_special_tokens=skips)
        assert ours.batch_decode(batch, skip_special_tokens=skips) == expected
    assert ours.decode(rows[0]) == oracle.decode(rows[0])


def test_tokens_and_ids_are_converted(ours, oracle):
    """One or several; unknown ones too."""
    for ids in (5, [0, 5, 60], [], [10**6], [0, 1, 5]):
        assert ours.convert_ids_to_tokens(ids) == oracle.convert_ids_to_tokens(ids)
    assert ours.convert_ids_to_tokens([0, 5, 1], True) == oracle.convert_ids_to_tokens(
        [0, 5, 1], skip_special_tokens=True
    )
    for tokens in ("<s>", "nothing known", ["<s>", "a", "nothing known"], []):
        assert ours.convert_tokens_to_ids(tokens) == oracle.convert_tokens_to_ids(tokens)


def test_special_tokens_can_be_set(ours, oracle):
    """By text, and by id."""
    for tokenizer in (ours, oracle):
        tokenizer.pad_token_id = tokenizer.eos_token_id
        tokenizer.eos_token = "a"
    for name in ("pad_token", "pad_token_id", "eos_token", "eos_token_id", "special_tokens_map"):
        assert getattr(ours, name) == getattr(oracle, name)


@pytest.mark.parametrize("chat", [*CHATS, CHATS])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": True},
        {"tokenize": False},
        {"return_dict": False},
        {"tokenize": False, "add_generation_prompt": True},
        {"continue_final_message": True, "tokenize": False},
        {"truncation": True, "max_length": 4},
        {"padding": True, "return_tensors": "pt"},
        {"chat_template": "{{ mood }}{{ messages[0].content }}", "mood": "calm"},
    ],
)
def test_apply_chat_template(ours, oracle, chat, options):
    """A mapping by default, ids or text where they are asked for; no generation prompt unasked."""
    ours.pad_token = oracle.pad_token = ours.eos_token
    assert same(
        ours.apply_chat_template(chat, **options), oracle.apply_chat_template(chat, **options)
    )


@pytest.mark.parametrize("template", [templates.PARTS, templates.BOTH, templates.MACRO])
def test_parts_are_templates_to_join_as_in_transformers(ours, oracle, template):
    """Where the template reads them."""
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    ours.chat_template = oracle.chat_template = template
    chat = [{"role": "user", "content": parts}]
    expected = oracle.apply_chat_template(chat, tokenize=False)
    assert ours.apply_chat_template(chat, tokenize=False) == expected


def test_a_tokenizer_without_template_says_so(ours):
    """As LLM.chat does."""
    ours.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ours.apply_chat_template(CHATS[0])


def test_a_tokenizer_can_be_sent_to_another_process(ours):
    """As data sets do with the function that reads them; also after its template was used."""
    before = ours.apply_chat_template(CHATS[1])
    ours.pad_token = "</s>"
    received = pickle.loads(pickle.dumps(ours))
    assert received.apply_chat_template(CHATS[1]) == before
    assert received.pad_token == "</s>"
