"""Messages of a body and messages that came in none: random ones fare alike."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fastserve.server.errors import from_validation
from fastserve.server.protocol import ChatInput
from fastserve.text.chat_renderer import ChatRenderer
from tests import chat_templates as templates

SOURCES = ("STRING", "PARTS", "BOTH", "SMOLVLM", "CALLS_JSON", "CALLS_WITHOUT_CONTENT")
RENDERERS = [ChatRenderer(getattr(templates, name), {}) for name in SOURCES]
WORDS = st.sampled_from(["", "user", "text", "{}", '{"a": 1}'])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)


def objects(
    required: dict[str, st.SearchStrategy[Any]], **optional: st.SearchStrategy[Any]
) -> st.SearchStrategy[Any]:
    """Return objects, one in six of them with a field of any type, or no object at all."""
    right = st.fixed_dictionaries(required, optional=optional)
    names = st.sampled_from(sorted({**required, **optional}))
    wrong = st.tuples(right, names, VALUES).map(lambda made: {**made[0], made[1]: made[2]})
    return st.integers(0, 11).flatmap(lambda n: VALUES if n == 0 else wrong if n == 1 else right)


KINDS = st.sampled_from(["text", "text", "text", "input_text", "output_text", "refusal", "file"])
PARTS = objects({"type": KINDS, "text": WORDS}, refusal=WORDS) | WORDS
FUNCTIONS = objects({"name": WORDS}, arguments=VALUES)
CALLS = objects({"function": FUNCTIONS}, type=st.just("function"), name=WORDS)
ROLES = st.sampled_from(["user", "assistant", "system", "developer", "tool", "function"])
MESSAGES = st.lists(
    objects(
        {"role": ROLES, "content": WORDS | st.none() | st.lists(PARTS, max_size=2)},
        tool_calls=st.lists(CALLS, max_size=2),
        function_call=FUNCTIONS,
        reasoning=WORDS,
        refusal=WORDS,
        name=WORDS,
    ),
    max_size=3,
)


def answer(renderer: ChatRenderer, messages: Any) -> tuple[str, str]:
    """Return what becomes of messages, a prompt or an error, and its text."""
    try:
        return "prompt", renderer.render(messages)
    except ValueError as error:
        return "error", str(error)


def answer_over_http(renderer: ChatRenderer, messages: Any) -> tuple[str, str]:
    """Return the same for messages in the body of a request."""
    try:
        body = ChatInput.model_validate_json(json.dumps({"messages": messages}))
    except ValidationError as error:
        return "error", from_validation(error).message
    return answer(renderer, [one.model_dump(exclude_unset=True) for one in body.messages])


def test_random_messages_fare_alike():
    """The same prompt, or the same words; nothing but a ValueError comes out of any of them."""
    seen: Counter[str] = Counter()

    @settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @given(st.sampled_from(RENDERERS), MESSAGES)
    def check(renderer, messages):
        ours = answer(renderer, messages)
        assert ours == answer_over_http(renderer, messages)
        seen[ours[0]] += 1

    check()
    assert min(seen["prompt"], seen["error"]) > 50
