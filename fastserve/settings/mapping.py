"""Names and values, wherever they come from, as a config class.

Rules: an unknown name and a value of another type are ConfigErrors that name the source and the
key. A field of several words may be given one word, a list, or a JSON list in one word.
Must not know: any setting by name, flags, files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from fastserve.settings.option import ConfigError, field_type, takes_many

T = TypeVar("T")


def from_mapping(owner: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """Build a config from names and values, checking names and types.

    Raises ConfigError naming `source` and the key.
    """
    known = {spec.name for spec in dataclasses.fields(typing.cast(Any, owner))}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{source}: unknown option {key!r}{did_you_mean(key, known)}")
        if takes_many(owner, key):
            checked[key] = as_words(value, f"{source}: {key}")
            continue
        kind = field_type(owner, key)
        is_number = kind is float and isinstance(value, int) and not isinstance(value, bool)
        is_plain = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if value is not None and not (is_number or is_plain):
            raise ConfigError(
                f"{source}: {key} must be {kind.__name__}, got {type(value).__name__} {value!r}"
            )
        checked[key] = value
    return owner(**checked)


def as_words(value: Any, name: str) -> tuple[str, ...]:
    """Return what a field of several words was given: a word, a list, or a JSON list in one word.

    Raises ConfigError calling the field `name`.
    """
    if value is None:
        return ()
    words = [value] if isinstance(value, str) else value
    if isinstance(words, list) and len(words) == 1 and str(words[0]).startswith("["):
        with contextlib.suppress(ValueError):  # a word that begins like a list
            words = json.loads(words[0])
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{name} must be str or a list of them, got {type(value).__name__}")
    return tuple(words)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the nearest of the `known` names, "" if none is near."""
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""
