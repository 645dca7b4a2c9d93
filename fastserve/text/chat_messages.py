"""From the messages of an API's user to the messages that a chat template reads.

Rules: one path for the server and for `LLM`; messages are plain mappings, in OpenAI's shape. What
cannot be honoured is a ValueError with words for the user, never dropped silently; fields that
OpenAI does not know reach the template. Must not know: HTTP, ids, torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastserve.text.chat_shape import check_messages, is_list
from fastserve.text.template_reading import TemplateReading

logger = logging.getLogger(__name__)

# Type of a content part → the field with its text.
TEXT_FIELDS: Mapping[str, str] = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
# Roles that OpenAI has two names for; templates often know only the one on the right.
ROLE_ALIASES: Mapping[str, str] = {"developer": "system", "function": "tool"}
REASONING_FIELDS = ("reasoning", "reasoning_content")
RESERVED_VARIABLES = ("messages", "add_generation_prompt", "continue_final_message")
# What a request may not set either: what its own fields are for, and what marks the roles.
RESERVED_OF_REQUESTS = (*RESERVED_VARIABLES, "tools", "documents")
SPECIAL_TOKEN = "_token"  # the end of their names


def conversation_list(messages: Any) -> list[Any]:
    """Return conversations: those of a list of them, or the one that a list of messages is."""
    is_several = is_list(messages) and messages and is_list(messages[0])
    return list(messages) if is_several else [messages]


def template_messages(messages: Any, reading: TemplateReading) -> list[dict[str, Any]]:
    """Return the messages as a template reads them; ValueError for what cannot be honoured."""
    check_messages(messages)
    if not messages:
        raise ValueError("messages must not be empty.")
    return [
        template_message(message, f"messages[{index}]", reading)
        for index, message in enumerate(messages)
    ]


def template_variables(chosen: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return `chat_template_kwargs`; ValueError for names that are not the user's to set."""
    for name in RESERVED_VARIABLES:
        if chosen and name in chosen:
            raise ValueError(f"chat_template_kwargs must not set {name}.")
    return {str(name): value for name, value in (chosen or {}).items()}


def check_request_variables(chosen: Mapping[str, Any] | None) -> None:
    """Raise ValueError for a name in a request's `chat_template_kwargs` that is not its to set."""
    for name in chosen or {}:
        if name in RESERVED_OF_REQUESTS or name.endswith(SPECIAL_TOKEN):
            raise ValueError(f"chat_template_kwargs must not set {name}.")


def template_message(
    message: Mapping[str, Any], where: str, reading: TemplateReading
) -> dict[str, Any]:
    """Return one message as a template reads it; null fields are absent."""
    role = message["role"]
    values = {str(name): value for name, value in message.items() if value is not None}
    if role not in reading.roles_named:
        values["role"] = ROLE_ALIASES.get(role, role)
    content = message.get("content")
    if content is None and role != "assistant":
        raise ValueError(f"A message of role {role!r} must have content.")
    if role == "assistant":
        if content is None and isinstance(message.get("refusal"), str):
            content = message["refusal"]  # what was said instead
        add_tool_calls(values, where, reading.calls.arguments_as_text)
        add_reasoning(values)
    if content is None and "tool_calls" in values and reading.calls.no_content_is_none:
        values["content"] = None
    else:
        texts = content or ""
        if not isinstance(texts, str):
            texts = [part_text(part) for part in texts]
        values["content"] = template_content(texts, values["role"], reading)
    return values


def template_content(texts: str | list[str], role: str, reading: TemplateReading) -> Any:
    """Return a content in the form that the template reads of this role."""
    form = reading.content(role)
    if not isinstance(texts, str):
        if form.num_parts == 2 and texts:
            return [text_part(text) for text in texts]
        texts = "\n".join(texts)
    if form.text or not form.num_parts:
        return texts
    return [text_part(texts)]


def text_part(text: str) -> dict[str, str]:
    """Return a content part."""
    return {"type": "text", "text": text}


def part_text(part: str | Mapping[str, Any]) -> str:
    """Return the text of a part; ValueError for a part that has none."""
    if isinstance(part, str):
        return part
    kind = part["type"]
    if kind not in TEXT_FIELDS:
        raise ValueError(
            f"Content parts of type {kind!r} are not supported; this model reads text."
        )
    text: str | None = part.get(TEXT_FIELDS[kind])
    if text is None:
        raise ValueError(f"A content part of type {kind!r} must have {TEXT_FIELDS[kind]}.")
    return text


def add_reasoning(values: dict[str, Any]) -> None:
    """Give an assistant's reasoning both names that templates have for it."""
    given = [values[name] for name in REASONING_FIELDS if name in values]
    if given:
        for name in REASONING_FIELDS:
            values.setdefault(name, given[0])


def add_tool_calls(values: dict[str, Any], where: str, as_text: bool) -> None:
    """Bring an assistant's tool calls, or its one call of the older API, into one form."""
    calls = values.pop("tool_calls", None) or []
    if not is_list(calls):
        raise ValueError(f"{where}.tool_calls: Input should be a valid array.")
    named = [(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    if not named and "function_call" in values:
        old = {"type": "function", "function": values.pop("function_call")}
        named = [(old, f"{where}.function_call")]
    if named:
        values["tool_calls"] = [template_call(call, name, as_text) for call, name in named]


def template_call(call: Any, where: str, as_text: bool) -> dict[str, Any]:
    """Return a tool call whose arguments are an object, or text where the template reads that.

    The function's name and arguments may also stand in the call itself.
    """
    if not isinstance(call, Mapping) or call.get("type", "function") != "function":
        raise ValueError(f"{where}: only calls of type 'function' are supported.")
    if "function" not in call and "name" in call:
        return {**call, "arguments": arguments_of(call, as_text)}
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise ValueError(f"{where}: a call must have a function with its name and arguments.")
    return {**call, "function": {**function, "arguments": arguments_of(function, as_text)}}


def arguments_of(function: Mapping[str, Any], as_text: bool) -> Any:
    """Return a call's arguments; {} for those that are no JSON object.

    A model wrote them, and they stay in the conversation: refusing them would end it for good.
    """
    given = function.get("arguments") or {}
    parsed = given
    if isinstance(given, str):
        try:
            parsed = json.loads(given)
        except (ValueError, RecursionError):
            parsed = None
    if not isinstance(parsed, Mapping):
        logger.warning(
            "the arguments of a call of %r are no JSON object; the template gets an empty one",
            str(function.get("name"))[:64],
        )
        given = parsed = {}
    if not as_text:
        return parsed
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
