"""Finds a model's directory and reads the small files in it that decide how requests end.

Rules: a directory stays where it is; a hub id becomes its snapshot in the hub's cache. Everything
that can go wrong is a ConfigError of one line, which says what was given where that is no model.
Must not know: torch, weights, the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastserve.checkpoint import hub
from fastserve.checkpoint.config_defaults import DEFAULTS
from fastserve.checkpoint.kinds import (
    FILE_SUFFIXES,
    describe_directory,
    describe_file,
    did_you_mean,
    similar_directory,
)
from fastserve.core.request import SamplingParams
from fastserve.host.json_file import read_object
from fastserve.settings.option import ConfigError

BUNDLED = Path(__file__).resolve().parent.parent / "demo"
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def locate(
    model: str, revision: str | None = None, holds: Sequence[str] = ("config.json",)
) -> Path:
    """Return the directory of a model: the bundled `demo`, a directory, or a hub snapshot."""
    path = _expanded(model)
    if model == "demo":
        directory = BUNDLED
    elif path.is_dir():
        directory = path.resolve()
    elif path.exists():
        raise ConfigError(f"model {model!r}: {describe_file(path)}")
    elif _reads_as_path(model):
        raise ConfigError(f"model {model!r}: no such directory{did_you_mean(path)}")
    else:
        try:
            directory = hub.fetch(model, revision, has_weights="config.json" in holds)
        except ConfigError as error:
            raise ConfigError(f"{error}{did_you_mean(path)}") from error.__cause__
    _refuse_pipes(directory)
    if "config.json" in holds and (kind := describe_directory(directory)) is not None:
        raise ConfigError(f"model {model!r}: {kind}")
    if not any((directory / name).is_file() for name in holds):
        raise ConfigError(f"model {model!r}: {directory} holds no {' or '.join(holds)}")
    return directory


def _refuse_pipes(directory: Path) -> None:
    """Raise ConfigError for what is no file: who reads it might wait for ever."""
    try:
        paths = list(directory.iterdir())
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror}") from error
    for path in paths:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ConfigError(f"{path}: a named pipe, a socket or a device, and no file")


def public_name(model: str) -> str:
    """Return what everybody may call a model: of a directory only its own name, not where it is."""
    path = _expanded(model)
    return path.resolve().name or model if path.is_dir() else model


def _expanded(model: str) -> Path:
    """Return the path that a model's name is, if it is one."""
    if not model:
        raise ConfigError("model '': an empty name")
    try:
        path = Path(model).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, or the home of no user
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"model {model[:100]!r}: {reason}") from None
    return path


def _reads_as_path(model: str) -> bool:
    """Whether a name cannot be meant for the hub, so that its typing error is not taken there."""
    return bool(
        model.startswith(("/", ".", "~"))
        or model.endswith(("/", *FILE_SUFFIXES))
        or model.count("/") > 1
        or "\\" in model
        # It is beside a directory of nearly that name.
        or (
            Path(model).parent.name
            and Path(model).parent.is_dir()
            and similar_directory(Path(model))
        )
    )


def eos_token_ids(directory: Path, of_tokenizer: int | None = None) -> frozenset[int]:
    """Return the ids that end a text, the model's and its tokenizer's.

    The model's are generation_config.json's, else config.json's, else those of its family. An id
    beyond the vocabulary can never be drawn, and is left out.
    """
    config = read_object(directory / "config.json") or {}
    config = {**DEFAULTS.get(str(config.get("model_type")), {}), **config}
    ids = _ids(directory / "generation_config.json") or _ids(directory / "config.json", config)
    if of_tokenizer is not None:
        ids = [*ids, of_tokenizer]
    vocab_size = config.get("vocab_size")
    return frozenset(i for i in ids if not isinstance(vocab_size, int) or i < vocab_size)


def vocab_size(directory: Path) -> int | None:
    """Return how many ids a model knows, as its config.json says it; None where it does not."""
    size = (read_object(directory / "config.json") or {}).get("vocab_size")
    return size if isinstance(size, int) else None


def _ids(path: Path, content: Mapping[str, Any] | None = None) -> list[int]:
    """Return the ids that a file names as ends of a text: one, several or none."""
    value = (read_object(path) or {} if content is None else content).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ConfigError(f"{path}: eos_token_id must be an id or a list of ids, got {value!r}")
    return ids


def sampling_defaults(directory: Path) -> dict[str, Any]:
    """Return the sampling parameters that generation_config.json sets, by FastServe's names."""
    path = directory / "generation_config.json"
    content = read_object(path) or {}
    defaults: dict[str, Any] = {}
    for key in (*SAMPLING_KEYS, "max_new_tokens"):
        value = content.get(key)
        if value is None:
            continue
        allowed = (int,) if key in ("top_k", "max_new_tokens") else (int, float)
        if type(value) not in allowed:
            raise ConfigError(f"{path}: {key} must be a number, got {value!r}")
        defaults["max_tokens" if key == "max_new_tokens" else key] = value
    try:
        SamplingParams(**defaults)  # what no request could use is refused at the start
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    return defaults
