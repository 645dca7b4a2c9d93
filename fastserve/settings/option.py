"""How a setting is declared, and how flags and YAML become a config class.

Rules: a config class is a frozen dataclass whose fields are made by `option`; everything else (the
flag's name and type, the YAML key, the documentation) follows from the field. A field of type
`tuple[str, ...]` takes several words: after one flag, by a repeated flag, as a YAML or JSON list.
Must not know: any setting by name.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that cannot be honoured; the message is one line for the user."""


def option(
    default: Any,
    text: str,
    *,
    choices: Sequence[Any] = (),
    aliases: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    positional: bool = False,
) -> Any:
    """Declare a setting: its default, help text and range."""
    return dataclasses.field(
        default=default,
        metadata={
            "help": text,
            "choices": tuple(choices),
            "aliases": tuple(aliases),
            "minimum": minimum,
            "maximum": maximum,
            "positional": positional,
        },
    )


def check_ranges(config: Any) -> None:
    """Raise ConfigError for the first field outside its declared choices or range."""
    for spec in dataclasses.fields(config):
        value, meta = getattr(config, spec.name), spec.metadata
        if value is None:
            continue
        flag = "--" + spec.name.replace("_", "-")
        if takes_many(type(config), spec.name) and not isinstance(value, tuple):
            raise ConfigError(f"{flag}: a tuple is expected, got {type(value).__name__}")
        for word in value if isinstance(value, tuple) else (value,):
            if isinstance(word, str) and not word.strip():  # an unset variable in a script
                raise ConfigError(f"{flag}: an empty value")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"{flag}: {value} does not fit 64 bits")
        if meta["choices"] and value not in meta["choices"]:
            allowed = ", ".join(map(str, meta["choices"]))
            raise ConfigError(f"{flag}: {value!r} is not one of: {allowed}")
        if meta["minimum"] is not None and not value >= meta["minimum"]:
            raise ConfigError(f"{flag}: {value} is below the minimum of {meta['minimum']}")
        if meta["maximum"] is not None and not value <= meta["maximum"]:
            raise ConfigError(f"{flag}: {value} is above the maximum of {meta['maximum']}")


def takes_many(owner: type, name: str) -> bool:
    """Whether a field takes several words."""
    return typing.get_origin(typing.get_type_hints(owner)[name]) is tuple


def field_type(owner: type, name: str) -> type:
    """Return the plain type of a field: `int` for `int | None`, `str` for `tuple[str, ...]`."""
    hint = typing.get_type_hints(owner)[name]
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    assert isinstance(hint, type)
    return hint


def add_arguments(
    parser: argparse.ArgumentParser,
    owner: type,
    *,
    has_positional: bool = True,
    only: Container[str] | None = None,
) -> None:
    """Give `parser` one flag per field of a config class, spelled as the field with dashes.

    Absent flags leave no attribute, so that a YAML file or the class supplies the value.
    The positional of the class can be given as a flag too, and only so with `has_positional` false.
    `only` names the fields
    that get a flag, where not all do.
    """
    group = parser.add_argument_group((owner.__doc__ or "").split("\n")[0].rstrip("."))
    for spec in dataclasses.fields(owner):
        if only is not None and spec.name not in only:
            continue
        meta, kind = spec.metadata, field_type(owner, spec.name)
        text = meta["help"].replace("%", "%%")
        if spec.default not in (None, ()) and kind is not bool:
            text += f" (default: {spec.default})"
        names = ["--" + spec.name.replace("_", "-"), *meta["aliases"]]
        if meta["positional"] and has_positional:
            either = parser.add_mutually_exclusive_group()
            either.add_argument(
                spec.name,
                nargs="?",
                type=kind,
                default=argparse.SUPPRESS,
                help=text,
                metavar=spec.name.upper(),
            )
            either.add_argument(
                *names, dest=spec.name, type=kind, default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )
            continue
        if kind is bool:
            group.add_argument(
                *names,
                dest=spec.name,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=f"{text} (default: {spec.default})",
            )
        else:
            many: dict[str, Any] = {"nargs": "+", "action": "extend"}
            group.add_argument(
                *names,
                **(many if takes_many(owner, spec.name) else {}),
                dest=spec.name,
                type=kind,
                default=argparse.SUPPRESS,
                help=text,
                choices=meta["choices"] or None,
                metavar=None if meta["choices"] else kind.__name__.upper(),
            )


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
