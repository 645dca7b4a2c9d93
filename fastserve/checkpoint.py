"""Finds a model's directory and reads the small files in it that decide how requests end.

Rules: a directory stays where it is; a hub id becomes its snapshot in the hub's cache. Everything
that can go wrong is a ConfigError of one line. Must not know: torch, weights, the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from fastserve.config import ConfigError
from fastserve.core.request import SamplingParams
from fastserve.model.config_defaults import DEFAULTS

BUNDLED = Path(__file__).parent / "demo"
FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt")
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def locate(
    model: str, revision: str | None = None, holds: Sequence[str] = ("config.json",)
) -> Path:
    """Return the directory of a model: the bundled `demo`, a directory, or a hub snapshot."""
    if model == "demo":
        directory = BUNDLED
    elif Path(model).expanduser().is_dir():
        directory = Path(model).expanduser().resolve()
    elif model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        raise ConfigError(f"model {model!r}: no such directory")
    else:
        directory = _download(model, revision)
    if not any((directory / name).is_file() for name in holds):
        raise ConfigError(f"model {model!r}: {directory} holds no {' or '.join(holds)}")
    return directory


def _download(model: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(FILES)))
    except HFValidationError:
        raise ConfigError(
            f"model {model!r} is neither a directory nor a hub id such as org/name"
        ) from None
    # The hub's client raises errors of several libraries; all mean that there is no model.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"model {model!r} is no directory and could not be fetched from the hub: "
            f"{reason[:300] or type(error).__name__}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def eos_token_ids(directory: Path, of_tokenizer: int | None = None) -> frozenset[int]:
    """Return the ids that end a text, by either of those who tell: the model and its tokenizer.

    The model's are generation_config.json's, else config.json's, else those of its family. An id
    beyond the vocabulary can never be drawn, and is left out.
    """
    config = read_json(directory / "config.json")
    config = {**DEFAULTS.get(str(config.get("model_type")), {}), **config}
    ids = _ids(directory / "generation_config.json") or _ids(directory / "config.json", config)
    if of_tokenizer is not None:
        ids = [*ids, of_tokenizer]
    vocab_size = config.get("vocab_size")
    return frozenset(i for i in ids if not isinstance(vocab_size, int) or i < vocab_size)


def _ids(path: Path, content: Mapping[str, Any] | None = None) -> list[int]:
    """Return the ids that a file names as ends of a text: one, several or none."""
    value = (read_json(path) if content is None else content).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ConfigError(f"{path}: eos_token_id must be an id or a list of ids, got {value!r}")
    return ids


def sampling_defaults(directory: Path) -> dict[str, Any]:
    """Return the sampling parameters that generation_config.json sets, by FastServe's names."""
    path = directory / "generation_config.json"
    content = read_json(path)
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
