"""Which chat templates a model directory has, and that of the user.

Rules: the user's replaces the model's; chat_template.jinja comes before tokenizer_config.json. A
model may have a second one for conversations with tools. Must not know: what templates are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastserve.settings.option import ConfigError

DEFAULT = "default"
WITH_TOOLS = "tool_use"
FILE = "chat_template.jinja"
OTHER_FILES = "additional_chat_templates"  # a directory: NAME.jinja


def read_templates(
    model_dir: Path, settings: Mapping[str, Any], chosen: str | None
) -> dict[str, str]:
    """Return a model's templates by name, or the user's, which is for everything.

    `settings` are tokenizer_config.json's, `chosen` is a file or a template.
    """
    if chosen is not None:
        return {DEFAULT: read_template(chosen)}
    if (model_dir / FILE).is_file():
        found = {DEFAULT: read_text(model_dir / FILE)}
        with_tools = model_dir / OTHER_FILES / f"{WITH_TOOLS}.jinja"
        if with_tools.is_file():
            found[WITH_TOOLS] = read_text(with_tools)
        return found
    value = settings.get("chat_template")
    if isinstance(value, str):
        return {DEFAULT: value}
    entries = (
        [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    )
    named = {str(entry.get("name")): entry.get("template") for entry in entries}
    return {name: text for name, text in named.items() if isinstance(text, str)}


def read_template(source: str) -> str:
    """Return the template in a file, or `source` itself where it reads as one."""
    path = Path(source)
    if "{" not in source and "\n" not in source:
        if not path.is_file():
            raise ConfigError(f"--chat-template: no such file: {source}")
        return read_text(path)
    return source


def read_text(path: Path) -> str:
    """Return the text of a file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
