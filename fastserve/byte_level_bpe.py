"""Makes a tokenizer of GPT-2's files, vocab.json and merges.txt, where there is no tokenizer.json.

Rules: only GPT-2's way of cutting text is known here (GPT-2, OPT); a directory that names another
class of tokenizer is refused. Must not know: chat templates, HTTP, the engine, torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from fastserve.config import ConfigError

FILES = ("vocab.json", "merges.txt")
NAMES = " and ".join(FILES)
CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast")
END_OF_TEXT = "<|endoftext|>"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def named_tokens(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special tokens that have a name; those of GPT-2 where nothing is said of them."""
    names = ("bos_token", "eos_token", "unk_token")
    named = {name: settings.get(name, END_OF_TEXT) for name in names}
    return {name: value for name, value in named.items() if value is not None}


def build(directory: Path, settings: Mapping[str, Any], added: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer; `settings` are tokenizer_config.json's, `added` added_tokens.json's."""
    kind = settings.get("tokenizer_class")
    if kind not in CLASSES:
        raise ConfigError(
            f"{directory}: no tokenizer.json, and {NAMES} cannot be read as those of a {kind}"
        )
    try:
        vocab, merges = (str(directory / name) for name in FILES)
        backend = Tokenizer(models.BPE.from_file(vocab, merges))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{directory}: {NAMES} make no tokenizer: {error}") from error
    has_prefix = bool(settings.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=has_prefix)
    backend.decoder = decoders.ByteLevel()
    try:
        extra = _added_tokens(settings, added)
        named = {name: _token(value) for name, value in named_tokens(settings).items()}
        others = [_token(value) for value in settings.get("additional_special_tokens") or ()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{directory}: special tokens cannot be read: {error!r}") from error
    for token_id, token in sorted(extra.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise ConfigError(
                f"{directory}: the added token {token.content!r} cannot have the id {token_id}"
            )
    special = [*named.values(), *others]
    backend.add_special_tokens([t for t in special if backend.token_to_id(t.content) is not None])
    ends = {side: named.get(f"{side}_token") for side in ("bos", "eos")}
    _add_ends(backend, directory, {s: t for s, t in ends.items() if settings.get(f"add_{s}_token")})
    return backend


def _added_tokens(settings: Mapping[str, Any], added: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Return the tokens beside the vocabulary, by id, from either place where they are kept."""
    tokens = {int(token_id): _token(text, is_special=False) for text, token_id in added.items()}
    for token_id, entry in (settings.get("added_tokens_decoder") or {}).items():
        tokens[int(token_id)] = _token(entry, is_special=bool(entry.get("special", False)))
    return tokens


def _token(value: Any, *, is_special: bool = True) -> AddedToken:
    """Return a token that a file gives as a text or as an object."""
    entry = value if isinstance(value, dict) else {"content": value}
    flags = {name: bool(entry[name]) for name in FLAGS if name in entry}
    return AddedToken(entry["content"], special=is_special, **flags)


def _add_ends(backend: Tokenizer, directory: Path, ends: Mapping[str, AddedToken | None]) -> None:
    """Let encoding put the tokens around a text that the settings ask for."""
    if not ends:
        return
    ids: dict[str, int] = {}
    pattern = ["$A"]
    for side, token in ends.items():
        text = "" if token is None else token.content
        token_id = backend.token_to_id(text)
        if token_id is None:
            raise ConfigError(f"{directory}: add_{side}_token asks for {text!r}, which has no id")
        ids[text] = token_id
        pattern = [text, *pattern] if side == "bos" else [*pattern, text]
    backend.post_processor = processors.TemplateProcessing(
        single=pattern, special_tokens=list(ids.items())
    )
