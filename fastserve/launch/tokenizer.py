"""Opens a model's text: its tokenizer, and what renders its chat template.

Must not know: what is said, who asks.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from fastserve.checkpoint import locate as checkpoint
from fastserve.launch.children import environment
from fastserve.settings.engine import EngineConfig
from fastserve.text.render_pool import RenderPool
from fastserve.text.tokenizer import Tokenizer

# What a process that renders templates finds in its environment, besides where the package is.
KEPT_FOR_TEMPLATES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")
logger = logging.getLogger(__name__)


def open_tokenizer(config: EngineConfig, chat_template: str | None = None) -> Tokenizer | None:
    """Load the tokenizer; None when the model has none and no other is named."""
    directory = tokenizer_dir(config)
    if config.tokenizer is None and not Tokenizer.is_in(directory):
        logger.warning(Tokenizer.why_none(directory))
        return None
    tokenizer = Tokenizer.load(directory, chat_template)
    vocab_size = checkpoint.vocab_size(checkpoint.locate(config.model, config.revision))
    if vocab_size is not None:
        tokenizer.check_fits(vocab_size, directory)
    return tokenizer


def open_rendering(tokenizer: Tokenizer | None) -> RenderPool | None:
    """Return what renders a model's chat template, in processes of its own; None: it has none."""
    if tokenizer is None or tokenizer.chat_template is None:
        return None
    kept = {name: os.environ[name] for name in KEPT_FOR_TEMPLATES if name in os.environ}
    return RenderPool(
        tokenizer.chat_template,
        tokenizer.special_tokens,
        (sys.executable, "-P", "-m", "fastserve.text.render_process"),
        {**kept, **environment()},
    )


def tokenizer_dir(config: EngineConfig) -> Path:
    """Return where the tokenizer's files are: with the model, unless another is named."""
    if config.tokenizer is None:
        return checkpoint.locate(config.model, config.revision)
    return checkpoint.locate(config.tokenizer, holds=("tokenizer.json", "vocab.json"))
