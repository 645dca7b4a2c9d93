"""The flags of config classes, and what a command line and its --config file say as such classes.

Rules: a given flag wins over the file; an unknown key, an unreadable file and a key given twice are
ConfigErrors that name the file. A flag of several words may not take the verb's positional in with
them unnoticed: it would be a key, or a key it. Must not know: verbs, any setting by name.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fastserve.settings.mapping import did_you_mean, from_mapping
from fastserve.settings.option import ConfigError, field_type, takes_many

T = TypeVar("T")


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
    `only` names the fields that get a flag, where not all do.
    """
    group = parser.add_argument_group((owner.__doc__ or "").split("\n")[0].rstrip("."))
    for spec in dataclasses.fields(owner):
        if only is not None and spec.name not in only:
            continue
        meta, kind = spec.metadata, field_type(owner, spec.name)
        text = meta["help"].replace("%", "%%")
        if spec.default not in (None, ()):
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
                help=text,
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


class Settings:
    """What a command line and its --config file say, flags first."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.source = getattr(args, "config", None)
        self.values: dict[str, Any] = {}
        if self.source is not None:
            self.values.update(read_config(self.source, args.owners))
        self.values.update(vars(args))
        for owner in getattr(args, "owners", ()):
            for spec in dataclasses.fields(owner):
                if spec.metadata["positional"] and spec.name not in self.values:
                    refuse_if_swallowed(spec, args)

    def build(self, owner: type[T]) -> T:
        """Return one config class with its share of the values."""
        names = {spec.name for spec in dataclasses.fields(owner)}  # type: ignore[arg-type]
        mine = {name: value for name, value in self.values.items() if name in names}
        return from_mapping(owner, mine, source=self.source or "command line")


def refuse_if_swallowed(positional: dataclasses.Field[Any], args: argparse.Namespace) -> None:
    """Raise ConfigError if a flag's second or later word may be the positional that is missing.

    That is the default, a directory, or what looks like a path or a hub id. The words themselves
    are not repeated: they may be secret.
    """
    for owner in args.owners:
        for spec in dataclasses.fields(owner):
            words = getattr(args, spec.name, None)
            if not takes_many(owner, spec.name) or words is None:
                continue
            if any(w == positional.default or "/" in w or Path(w).is_dir() for w in words[1:]):
                flag, name = "--" + spec.name.replace("_", "-"), positional.name.upper()
                raise ConfigError(
                    f"{flag} takes every word that follows it, and one of these may be {name}; "
                    f"{name} goes before it: {name} {flag} ... "
                    f"({positional.default}: the default)"
                )


class YamlLoader(yaml.SafeLoader):
    """YAML as flags are read: 1e-3 is a number."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), "-+0123456789"
)


def read_config(path: str, owners: Sequence[type]) -> dict[str, Any]:
    """Return the settings of a YAML file; keys are flags or field names.

    Raises ConfigError for an unreadable file and for a key that no owner has, with its line.
    """
    names = {}
    for owner in owners:
        for spec in dataclasses.fields(owner):
            for name in (spec.name, *spec.metadata["aliases"]):
                names[name.lstrip("-").replace("-", "_")] = spec.name
    values: dict[str, Any] = {}
    for key, value, line in read_items(path):
        word = key.replace("-", "_")
        name = names.get(word)
        if name is None:
            near = did_you_mean(word, names).replace("_", "-")
            raise ConfigError(f"{path}:{line}: unknown option {key!r}{near}")
        if name in values:
            raise ConfigError(f"{path}:{line}: {key!r} is given twice")
        values[name] = value
    return values


def read_items(path: str) -> list[tuple[str, Any, int]]:
    """Return key, value and line number of each entry of a YAML file's mapping.

    Raises ConfigError, of one short line, for what is not such a file.
    """
    try:
        loader = YamlLoader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            kind = root.tag.rpartition(":")[2]
            raise ConfigError(f"{path}: a mapping of options is expected, not {kind}")
        return [
            (str(key.value), loader.construct_document(value), key.start_mark.line + 1)
            for key, value in root.value
        ]
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f":{mark.line + 1}"
        raise ConfigError(f"{path}{where}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{path}: not YAML: {reason}") from error
