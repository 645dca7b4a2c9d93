"""The special tokens of a model directory: their names, and those beside its vocabulary.

Rules: as transformers reads them: `added_tokens_decoder` of tokenizer_config.json says which tokens
there are beside the vocabulary and how they are cut, before tokenizer.json and added_tokens.json.
A token that cannot have the id that is written for it is a ConfigError; a named token without an id
is only a name. Must not know: chat templates, HTTP, the engine, torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer

from fastserve.settings.option import ConfigError

FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
LISTS = ("additional_special_tokens", "extra_special_tokens")


def token_text(value: object) -> str | None:
    """Return a special token's text, which files give as a string or as an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def named_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokens that have a name, as the file gives them."""
    own = settings.get("extra_special_tokens")
    named = {**settings, **(own if isinstance(own, dict) else {})}
    return {
        name: value
        for name, value in named.items()
        if name.endswith("_token") and isinstance(value, str | dict)
    }


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts that templates know by name: `bos_token`, or a model's own `image_token`."""
    named = named_values(settings)
    return {name: text for name in named if (text := token_text(named[name])) is not None}


def listed_tokens(settings: Mapping[str, Any]) -> list[str]:
    """Return the texts of the special tokens that are in a list and have no name."""
    lists = (settings.get(name) for name in LISTS)
    values = (value for entries in lists if isinstance(entries, list) for value in entries)
    return [text for value in values if (text := token_text(value)) is not None]


def complete(
    backend: Tokenizer, settings: Mapping[str, Any], added: Mapping[str, Any], source: Path
) -> None:
    """Give a tokenizer the tokens that the files beside its vocabulary tell of.

    `settings` are tokenizer_config.json's, `added` added_tokens.json's.
    """
    try:
        described = {int(i): described_token(text, is_special=False) for text, i in added.items()}
        for token_id, entry in (settings.get("added_tokens_decoder") or {}).items():
            is_special = bool(entry.get("special", False))
            described[int(token_id)] = described_token(entry, is_special=is_special)
        listed = [value for name in LISTS if isinstance(value := settings.get(name), list)]
        special = [
            *named_values(settings).values(),
            *(entry for list_ in listed for entry in list_),
        ]
        marked = [described_token(value, is_special=True) for value in special]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{source}: special tokens cannot be read: {error!r}") from error
    for token_id, token in sorted(described.items()):
        is_new = backend.token_to_id(token.content) is None
        backend.add_tokens([token])  # of one that is there already: its flags
        if is_new and backend.token_to_id(token.content) != token_id:
            raise ConfigError(
                f"{source}: the added token {token.content!r} cannot have the id {token_id}"
            )
    _mark_special(backend, marked)


def _mark_special(backend: Tokenizer, tokens: Iterable[AddedToken]) -> None:
    """Let tokens that have an id be special; those that were added keep their flags."""
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for token in tokens:
        if backend.token_to_id(token.content) is not None:
            kept = known.get(token.content, token)
            kept.special = True
            backend.add_special_tokens([kept])


def described_token(value: Any, *, is_special: bool) -> AddedToken:
    """Return a token that a file gives as a text or as an object."""
    entry = value if isinstance(value, dict) else {"content": value}
    flags = {name: bool(entry[name]) for name in FLAGS if name in entry}
    return AddedToken(entry["content"], special=is_special, **flags)


class _Added(msgspec.Struct):
    """One of the `added_tokens` of a tokenizer.json."""

    id: int
    content: str


class _TokenizerFile(msgspec.Struct):
    """What is read of a tokenizer.json: not the vocabulary, which is long."""

    added_tokens: list[_Added] = []


def written_id(path: Path, settings: Mapping[str, Any], name: str) -> int | None:
    """Return the id that the files give a named token, without loading the vocabulary.

    `path` is the tokenizer.json, which may be missing. None where they do not tell.
    """
    text = named_tokens(settings).get(name)
    try:
        tokens = msgspec.json.decode(path.read_bytes(), type=_TokenizerFile).added_tokens
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: not a tokenizer: {error}") from error
    return next((token.id for token in tokens if token.content == text), None)
