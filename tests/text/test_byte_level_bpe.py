"""vocab.json and merges.txt, against transformers and against GPT-2's own algorithm."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import regex  # type: ignore[import-untyped]
from transformers import AutoTokenizer

from fastserve.settings.option import ConfigError
from fastserve.text.tokenizer import Tokenizer, byte_alphabet
from tests import tiny_tokenizers

CUT = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
TEXTS = (
    "",
    "The quick brown fox, and then it'll jump; they're 12 of 345's.",
    "  two  spaces, trailing   ",
    "tabs\tand\n\nlines\r\n \n x",
    "Größe naïve Ελληνικά 日本語 😀 €5 \u00a0 \u200b é",
    "</s> in <s>a text</s> <mask> .x",
    "x" * 5000,
)
END = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": True}
MASK = {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False, "special": True}
OPT = {
    "tokenizer_class": "GPT2Tokenizer",
    "bos_token": END,
    "eos_token": END,
    "unk_token": END,
    "pad_token": "<s>",
    "add_prefix_space": False,
    "add_bos_token": True,
    "errors": "replace",
}
KINDS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "opt": ("opt", {"tokenizer_config": OPT}),
    "gpt2": ("gpt2", {"tokenizer_config": {"model_max_length": 1024}}),
    "special-tokens-map": (
        "gpt2",
        {
            "special_tokens_map": {"bos_token": "<s>", "eos_token": END, "unk_token": "<s>"},
            "added_tokens": {"<mask>": 301, " two": 302},
        },
    ),
    "ends-and-prefix": (
        "gpt2",
        {
            "tokenizer_config": {
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "</s>",
                "add_bos_token": True,
                "add_eos_token": True,
                "add_prefix_space": True,
                "additional_special_tokens": ["<|user|>"],
                "added_tokens_decoder": {"301": MASK},
            }
        },
    ),
}


def write(directory: Path, model_type: str = "gpt2", **files: Any) -> Path:
    """Write a trained vocabulary and its merges, and other JSON files."""
    backend = tiny_tokenizers.byte_level(300)
    backend.model.save(str(directory))
    vocab = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    if "<|endoftext|>" not in vocab:
        vocab["<|endoftext|>"] = len(vocab)
        (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    files.setdefault("config", {"model_type": model_type})
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


@pytest.fixture(scope="module", params=KINDS)
def model_dir(request, tmp_path_factory) -> Path:
    """A directory with vocab.json and merges.txt, and what says how to use them."""
    model_type, files = KINDS[request.param]
    return write(tmp_path_factory.mktemp(request.param), model_type, **files)


def random_texts(count: int) -> list[str]:
    """Return texts of all kinds of characters."""
    rng = random.Random(0)
    alphabet = "aehlotTH  \n\t'.,0127éßλ日😀" + "the and fox jump"
    return ["".join(rng.choices(alphabet, k=rng.randrange(60))) for _ in range(count)]


def test_equals_transformers(model_dir):
    """The same ids with and without special tokens, and the same text back."""
    ours, oracle = Tokenizer.load(model_dir), AutoTokenizer.from_pretrained(model_dir)
    assert ours.bos_token_id == oracle.bos_token_id
    assert ours.eos_token_id == oracle.eos_token_id
    assert ours.special_ids >= set(oracle.all_special_ids)
    assert ours.vocab_size == len(oracle)
    for text in (*TEXTS, *random_texts(200)):
        for adds in (True, False):
            ids = ours.encode(text, add_special_tokens=adds)
            assert ids == oracle.encode(text, add_special_tokens=adds)
            for skips in (True, False):
                assert ours.decode(ids, skips) == oracle.decode(ids, skip_special_tokens=skips)


def slow_encode(text: str, vocab: dict[str, int], ranks: dict[tuple[str, str], int]) -> list[int]:
    """Encode as GPT-2's first code does: join the best pair of a word until there is none."""
    char_of_byte = {value: char for char, value in byte_alphabet().items()}
    ids = []
    for piece in CUT.findall(text):
        word = [char_of_byte[value] for value in piece.encode()]
        while len(word) > 1:
            pairs = list(itertools.pairwise(word))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            joined, index = [], 0
            while index < len(word):
                is_best = tuple(word[index : index + 2]) == best
                joined.append("".join(word[index : index + 2]) if is_best else word[index])
                index += 2 if is_best else 1
            word = joined
        ids += [vocab[part] for part in word]
    return ids


def test_equals_the_slow_algorithm(tmp_path):
    """Independent of any library's reading of the two files."""
    write(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line.split(" ") for line in lines if not line.startswith("#version")]
    ranks = {(first, second): rank for rank, (first, second) in enumerate(merges)}
    ours = Tokenizer.load(tmp_path)
    for text in (*random_texts(300), TEXTS[1], TEXTS[2], TEXTS[3], TEXTS[4]):
        assert ours.encode(text) == slow_encode(text, vocab, ranks)
    assert any(len(ours.encode(text)) < len(text.encode()) - 5 for text in TEXTS)


def test_opt_begins_with_its_end_token(tmp_path):
    """OPT's text begins with `</s>`, which also ends it, and bytes survive the way back."""
    ours = Tokenizer.load(write(tmp_path, "opt", tokenizer_config=OPT))
    ids = ours.encode("Größe 😀")
    assert ids[0] == ours.bos_token_id == ours.eos_token_id == 1
    assert b"".join(map(ours.token_bytes, ids[1:])) == "Größe 😀".encode()


def test_tokenizer_json_wins(tmp_path):
    """Where both are there, tokenizer.json is the one."""
    write(tmp_path)
    tiny_tokenizers.save(tiny_tokenizers.byte_fallback(), tmp_path)
    assert Tokenizer.load(tmp_path).vocab_size == tiny_tokenizers.byte_fallback().get_vocab_size()


@pytest.mark.parametrize(
    ("settings", "added", "message"),
    [
        ({"tokenizer_class": "RobertaTokenizer"}, {}, "RobertaTokenizer"),
        ({"bos_token": "<none>", "add_bos_token": True}, {}, "'<none>', which has no id"),
        ({"eos_token": None, "add_eos_token": True}, {}, "add_eos_token"),
        ({"bos_token": {"text": "<s>"}}, {}, "special tokens cannot be read"),
        ({"added_tokens_decoder": {"x": MASK}}, {}, "special tokens cannot be read"),
        ({}, {"<mask>": 999}, "'<mask>' cannot have the id 999"),
    ],
)
def test_refused(settings, added, message, tmp_path):
    """What cannot be honoured is one line that names it."""
    write(tmp_path, tokenizer_config=settings, added_tokens=added)
    with pytest.raises(ConfigError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_broken_files(name, tmp_path):
    """A file that is not what its name says is a ConfigError; a missing one is no tokenizer."""
    write(tmp_path)
    (tmp_path / name).write_text("{ what is this\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="make no tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=r"neither tokenizer\.json nor vocab\.json"):
        Tokenizer.load(tmp_path)
