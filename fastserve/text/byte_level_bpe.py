"""Makes a tokenizer of GPT-2's files, vocab.json and merges.txt, where there is no tokenizer.json.

Rules: only GPT-2's way of cutting text is known here (GPT-2, OPT); a directory that names another
class of tokenizer is refused. Must not know: chat templates, HTTP, the engine, torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from fastserve.settings.option import ConfigError
from fastserve.text import special_tokens

FILES = ("vocab.json", "merges.txt")
NAMES = " and ".join(FILES)
CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast")
END_OF_TEXT = "<|endoftext|>"


def named_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special tokens of GPT-2, as they are where nothing is said of them."""
    names = ("bos_token", "eos_token", "unk_token")
    return {name: settings.get(name, END_OF_TEXT) for name in names}


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
    named = named_values(settings)
    special_tokens.complete(backend, {**settings, **named}, added, directory)
    ends = {side: special_tokens.token_text(named[f"{side}_token"]) for side in ("bos", "eos")}
    _add_ends(backend, directory, {s: t for s, t in ends.items() if settings.get(f"add_{s}_token")})
    return backend


def _add_ends(backend: Tokenizer, directory: Path, ends: Mapping[str, str | None]) -> None:
    """Let encoding put the tokens around a text that the settings ask for."""
    if not ends:
        return
    ids: dict[str, int] = {}
    pattern = ["$A"]
    for side, named in ends.items():
        text = named or ""
        token_id = backend.token_to_id(text)
        if token_id is None:
            raise ConfigError(f"{directory}: add_{side}_token asks for {text!r}, which has no id")
        ids[text] = token_id
        pattern = [text, *pattern] if side == "bos" else [*pattern, text]
    backend.post_processor = processors.TemplateProcessing(
        single=pattern, special_tokens=list(ids.items())
    )
