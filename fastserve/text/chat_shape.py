"""Whether values are messages in OpenAI's shape: the part of their check that is about types.

Rules: the words and the order are those of the server's schema (server/protocol.py), which has
judged the messages of a body before; here are judged those that did not come in one.
Must not know: what is done with messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def check_messages(messages: Any) -> None:
    """Raise ValueError for the first value that is not of the type that stands in its place."""
    if not is_list(messages):
        raise ValueError("messages: Input should be a valid array.")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        check_object(message, where)
        check_text(message, "role", where, is_required=True)
        content = message.get("content")
        if is_list(content):
            for position, part in enumerate(content):
                check_part(part, f"{where}.content[{position}]")
        else:
            check_text(message, "content", where)


def check_part(part: Any, where: str) -> None:
    """Raise ValueError for what is no content part: an object with a type, or a text."""
    if not isinstance(part, str):
        check_object(part, where)
        check_text(part, "type", where, is_required=True)
        check_text(part, "text", where)
        check_text(part, "refusal", where)


def check_object(value: Any, where: str) -> None:
    """Raise ValueError for what has no fields."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: Input should be an object.")


def check_text(
    value: Mapping[str, Any], name: str, where: str, *, is_required: bool = False
) -> None:
    """Raise ValueError for a field that is no text; it may be null or absent if not required."""
    if is_required and name not in value:
        raise ValueError(f"{where}.{name}: Field required.")
    text = value.get(name)
    if not isinstance(text, str) and (is_required or text is not None):
        raise ValueError(f"{where}.{name}: Input should be a valid string.")


def is_list(value: Any) -> bool:
    """Whether a value is a list, or a tuple: no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
