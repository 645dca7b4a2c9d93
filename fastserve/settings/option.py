"""How a setting is declared.

Rules: a config class is a frozen dataclass whose fields are made by `option`; everything else (the
flag's name and type, the YAML key, the documentation) follows from the field. A field of type
`tuple[str, ...]` takes several words.
Must not know: any setting by name, where values come from.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Sequence
from typing import Any


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
    return typing.get_origin(_hints(owner)[name]) is tuple


def field_type(owner: type, name: str) -> type:
    """Return the plain type of a field: `int` for `int | None`, `str` for `tuple[str, ...]`."""
    hint = _hints(owner)[name]
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    assert isinstance(hint, type)
    return hint


@functools.cache  # every setting asks, and it reads the hints of all settings of its class anew
def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)
