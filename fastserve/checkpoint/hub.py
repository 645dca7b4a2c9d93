"""Fetches a model from the Hugging Face hub, or takes the copy that its cache holds.

Rules: only what FastServe reads is fetched, from the top of the repository. A cached copy is enough
when it has all of that, whatever else the repository lists; what went wrong is a ConfigError of one
short line. Must not know: what is in the files.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fastserve.settings.option import ConfigError

TEXT_FILES = ("*.json", "*.jinja", "merges.txt")
WEIGHT_FILES = ("*.safetensors",)
UNREAD = ("*/*", "consolidated*")  # other frameworks' copies, and the weights in another layout
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
READ = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
}
READ_WITHOUT_TOKENIZER_JSON = {"vocab.json", "merges.txt"}


def fetch(model: str, revision: str | None, *, has_weights: bool) -> Path:
    """Return the directory of a model's files, downloaded where they are not there yet."""
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model,
                revision=revision,
                allow_patterns=[*TEXT_FILES, *(WEIGHT_FILES if has_weights else ())],
                ignore_patterns=list(UNREAD),
            )
        )
    except HFValidationError:
        raise ConfigError(
            f"model {model!r} is neither a directory nor a hub id such as org/name"
        ) from None
    except LocalEntryNotFoundError as error:
        lack = "it is not in the cache"
        # Versions of the client that know what a copy should hold refuse one that lacks anything.
        path = getattr(error, "snapshot_path", None)
        if path is not None:
            lacking = missing_files(Path(path), _listed(model, revision), has_weights=has_weights)
            if not lacking:
                return Path(path)
            lack = f"its copy in the cache lacks {', '.join(lacking)}"
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        reason = f"{lack}, and {why}"
    except GatedRepoError:
        reason = "it is gated: accept its terms on huggingface.co, then `hf auth login`"
    except RepositoryNotFoundError:
        reason = "there is no such model, or it is private (`hf auth login`)"
    except RevisionNotFoundError:
        reason = f"it has no revision {revision!r}"
    # The client raises errors of several libraries; all mean that there is no model.
    except Exception as error:
        first, _, _ = " ".join(str(error).split()).partition(". ")
        reason = f"{type(error).__name__}: {first[:100]}" if first else type(error).__name__
    raise ConfigError(
        f"model {model!r} is no directory and could not be fetched from the hub: {reason}"
    )


def missing_files(directory: Path, listed: Collection[str], *, has_weights: bool) -> list[str]:
    """Return what a copy of a repository lacks of what is read; shards are the index's matter."""
    needed = READ.intersection(listed)
    if "tokenizer.json" not in listed:
        needed |= READ_WITHOUT_TOKENIZER_JSON.intersection(listed)
    if has_weights and not (directory / SINGLE).is_file():
        if INDEX in listed:
            needed.add(INDEX)
        elif SINGLE in listed:
            needed.add(SINGLE)
        else:
            weights = {name for name in listed if name.endswith(".safetensors")}
            needed |= {name for name in weights if not name.startswith("consolidated")}
    return sorted(name for name in needed if not (directory / name).is_file())


def _listed(model: str, revision: str | None) -> set[str]:
    """Return the files at the top of the repository, by the list that the cache holds."""
    tree = huggingface_hub.get_cached_repo_tree(model, revision=revision)
    return {file.path for file in tree if "/" not in file.path}
