"""Tokenizers small enough to be trained in a test, of the two kinds that models bring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPECIAL_TOKENS = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
SAMPLE_TEXT = [
    "The quick brown fox jumps over the lazy dog, and then it jumps again.",
    "Größe, naïve, Ελληνικά, 日本語のテキスト, 😀😃 and €5: characters of two to four bytes.",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level(vocab_size: int = 300) -> Tokenizer:
    """Train a byte-level BPE (GPT-2, Llama 3, Qwen): most characters span several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SAMPLE_TEXT, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return backend


def chatml() -> Tokenizer:
    """Make a byte-level BPE that adds nothing to a text (Qwen): ChatML's marks are its specials."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [("u", "s"), ("e", "r"), ("h", "e"), ("l", "l")]
    tokens = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(marks)
    return backend


def word_pieces() -> Tokenizer:
    """Make a lower-casing WordPiece (BERT): spaces are no tokens, marks stand on both sides."""
    words = ["the", "dog", "##s", "##ö", "5", ","]
    marks = ["[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: index for index, token in enumerate([*marks, *words])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    backend.add_special_tokens(marks)
    return backend


def byte_fallback() -> Tokenizer:
    """Make a SentencePiece-like BPE (Llama 2): spaces begin words, rare characters are bytes."""
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyzTG.,:ö"))
    tokens = [*SPECIAL_TOKENS, "<unk>", *(f"<0x{value:02X}>" for value in range(256)), *letters]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "d"), ("o", "g"), ("▁d", "og")]
    tokens += ["".join(pair) for pair in merges]
    backend = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(SPECIAL_TOKENS)
    return backend


def save(backend: Tokenizer, directory: Path, **changes: Any) -> Path:
    """Write a tokenizer as a model directory holds it; `changes` to tokenizer_config.json."""
    backend.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        **changes,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
