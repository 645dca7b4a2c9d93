"""How a chat template reads messages: as strings or as parts, and what it makes of tool calls.

Rules: nothing is guessed from a template's text; it is rendered on small conversations with marks
in them, and what comes out tells. Each role is tried by itself: a template may read a user's parts
and only a system's string. Where nothing can be told, messages are given as strings.
Must not know: real messages, ids, HTTP.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fastserve.text.chat_template import ChatTemplate, ChatTemplateError

ContentFormat = Literal["auto", "string", "openai"]
CONTENT_FORMATS: tuple[ContentFormat, ...] = ("auto", "string", "openai")

FIRST = "qzfirstqz"
SECOND = "qzsecondqz"
KEY = "qzkeyqz"  # of a part: shown only by templates that print a part as it stands
CALLED = "qzcalledqz"
NAME = "qznameqz"
ARGUMENTS = {NAME: "qzvalueqz"}
FILLER = "qzfillerqz"


@dataclass(frozen=True, slots=True)
class ContentReading:
    """How the content of one role's messages is read."""

    text: bool = True  # a string is
    num_parts: int = 0  # of a list of text parts: none of them is, 1 (the first), or 2 (all)


STRINGS = ContentReading()
PARTS = ContentReading(text=False, num_parts=2)


@dataclass(frozen=True, slots=True)
class CallReading:
    """How tool calls are read."""

    arguments_as_text: bool = False  # and not as an object
    no_content_is_none: bool = False  # what stands beside them; otherwise an empty string


@dataclass(frozen=True, slots=True)
class TemplateReading:
    """How a template reads messages."""

    contents: Mapping[str, ContentReading] = field(default_factory=dict)  # by role
    default: ContentReading = STRINGS  # of every other role
    roles_named: frozenset[str] = frozenset()
    calls: CallReading = CallReading()

    def content(self, role: str) -> ContentReading:
        """Return how the content of a role's messages is read."""
        return self.contents.get(role, self.default)


def probe_template(
    template: ChatTemplate, content_format: ContentFormat = "auto"
) -> TemplateReading:
    """Find out how a template reads messages; `content_format` forces one form of content."""
    user = probe_content(template, [], {"role": "user"})
    asked = {"role": "user", "content": filler(user)}
    calls = probe_calls(template, asked)
    contents = {
        "user": user,
        "system": probe_content(template, [], {"role": "system"}, [asked]),
        "assistant": probe_content(template, [asked], {"role": "assistant"}),
        "tool": probe_content(
            template,
            [asked, tool_call_message(calls)],
            {"role": "tool", "tool_call_id": "abcdefghi", "name": CALLED},
        ),
    }
    default = user
    if content_format != "auto":
        default = STRINGS if content_format == "string" else PARTS
        contents = {}
    return TemplateReading(contents, default, template.roles_named, calls)


def probe_content(
    template: ChatTemplate,
    before: list[dict[str, Any]],
    message: dict[str, Any],
    after: list[dict[str, Any]] | None = None,
) -> ContentReading:
    """Try a string and two parts as the content of one message of a conversation."""

    def shown(content: Any) -> str:
        return rendered(template, [*before, {**message, "content": content}, *(after or [])])

    in_text = FIRST in shown(FIRST)
    in_parts = shown([{"type": "text", "text": mark, KEY: ""} for mark in (FIRST, SECOND)])
    num_parts = 0
    if KEY not in in_parts and FIRST in in_parts:
        num_parts = 2 if SECOND in in_parts else 1
    return ContentReading(in_text, num_parts) if in_text or num_parts else STRINGS


def filler(reading: ContentReading) -> Any:
    """Return a content that is read."""
    return FILLER if reading.text else [{"type": "text", "text": FILLER}]


def tool_call_message(calls: CallReading) -> dict[str, Any]:
    """Return an assistant's message that is a tool call."""
    arguments = json.dumps(ARGUMENTS) if calls.arguments_as_text else ARGUMENTS
    function = {"name": CALLED, "arguments": arguments}
    call = {"id": "abcdefghi", "type": "function", "function": function}  # Mistral's ids have 9
    content = None if calls.no_content_is_none else ""
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def probe_calls(template: ChatTemplate, asked: dict[str, Any]) -> CallReading:
    """Try tool calls in the four forms; the first that is shown as JSON, or piece by piece."""
    for no_content_is_none, arguments_as_text in itertools.product((False, True), repeat=2):
        calls = CallReading(arguments_as_text, no_content_is_none)
        text = rendered(template, [asked, tool_call_message(calls)])
        is_python = str(ARGUMENTS) in text or (no_content_is_none and "None" in text)
        is_whole = json.dumps(ARGUMENTS) in text or not arguments_as_text
        if NAME in text and is_whole and not is_python:
            return calls
    return CallReading()


def rendered(template: ChatTemplate, messages: list[dict[str, Any]]) -> str:
    """Return what a template makes of a trial; nothing where it refuses it."""
    try:
        return template.render(messages, add_generation_prompt=False)
    except ChatTemplateError:
        return ""
