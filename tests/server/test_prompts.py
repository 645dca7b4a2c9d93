"""Messages over HTTP: the prompt that the engine is given for them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastserve.text.tokenizer import Tokenizer
from tests import chat_templates as templates
from tests import tiny_tokenizers
from tests.server.scripted import NAMED, TOKENIZER, ScriptedEngine, call, make_app, post
from tests.server.test_errors import error_of

USER = {"role": "user", "content": "hi"}
FUNCTION = {"name": "weather", "arguments": '{"city": "Paris"}'}
TOOL = {"type": "function", "function": {"name": "weather"}}


def prompt_of(template: str, *messages: Any, **fields: Any) -> str:
    """Return the text of the prompt the engine is given; the error's message if there is none."""
    tokenizer = Tokenizer(tiny_tokenizers.byte_level(), NAMED, template)
    engine = ScriptedEngine()
    app = make_app(engine, tokenizer=tokenizer)
    body = {"messages": messages, "max_tokens": 1, **fields}
    response = call(app, "POST", "/v1/chat/completions", json=body)
    if response.status_code != 200:
        assert response.status_code == 400
        assert not engine.streams
        return str(response.json()["error"]["message"])
    return tokenizer.decode(engine.streams[0].prompt_token_ids, skip_special_tokens=False)


@pytest.mark.parametrize("arguments", ['{"city": "Paris"}', {"city": "Paris"}])
def test_arguments_are_encoded_once(arguments):
    """A string of JSON is an object to a template that encodes it."""
    function = {"name": "weather", "arguments": arguments}
    asked = {"role": "assistant", "tool_calls": [{"id": "a", "function": function}]}
    text = prompt_of(templates.CALLS_JSON, USER, asked)
    assert text.endswith('weather({"city": "Paris"})')


def test_a_developer_is_a_system():
    """To a template that raises on roles it does not know."""
    message = {"role": "developer", "content": "Be brief."}
    text = prompt_of(tiny_tokenizers.CHAT_TEMPLATE, message, USER)
    assert text.startswith("<s><|system|>Be brief.\n<|user|>hi")
    message["role"] = "robot"
    assert prompt_of(tiny_tokenizers.CHAT_TEMPLATE, message, USER).endswith("unknown role robot")


@pytest.mark.parametrize("content", ["hello", [{"type": "text", "text": "hello"}], ["hello"]])
@pytest.mark.parametrize("template", [templates.STRING, templates.BOTH, templates.PARTS])
def test_every_content_reaches_every_template(template, content):
    """Strings and parts, to templates that read the one or the other."""
    assert prompt_of(template, {"role": "user", "content": content}) == "<user>hello"


@pytest.mark.parametrize("given", ["reasoning", "reasoning_content"])
def test_reasoning_has_both_its_names(given):
    """A template reads either."""
    template = "{% for m in messages %}{{ m.reasoning }}|{{ m.reasoning_content }}{% endfor %}"
    said = {"role": "assistant", "content": "b", given: "why"}
    assert prompt_of(template, USER, said) == "|why|why"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"tools": [TOOL], "tool_choice": "none"}, "none"),
        ({"functions": [FUNCTION], "function_call": "none"}, "none"),
        ({"tools": [], "tool_choice": "auto"}, "none"),
        ({"tools": [TOOL]}, "tools is not supported by this server."),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tools is not supported by this server."),
        ({"functions": [FUNCTION]}, "functions is not supported by this server."),
        ({"tools": [TOOL], "function_call": "none"}, "tools is not supported by this server."),
    ],
)
def test_tools_that_none_is_to_be_chosen_of_are_as_no_tools(fields, text):
    """The template does not see them; those that a model may choose are refused by name."""
    assert prompt_of("{{ tools | tojson if tools else 'none' }}", USER, **fields) == text


def test_half_of_a_surrogate_pair_in_arguments_is_a_400():
    """They are JSON in a string, which the body's own check does not look into."""
    function = {"name": "weather", "arguments": json.dumps({"a": "\ud800"})}
    asked = {"role": "assistant", "tool_calls": [{"id": "a", "function": function}]}
    assert "lone surrogates" in prompt_of(templates.CALLS_JSON, USER, asked)


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_a_text_that_cannot_fit_is_refused_unseen(monkeypatch, num_prompts):
    """Were every token as long as the longest, there would be more than the window has."""
    monkeypatch.setattr(type(TOKENIZER), "encode", None)
    num_bytes = 100 * TOKENIZER.longest_token_bytes + 1
    text = "é" * (num_bytes // 2 + 1)
    prompt = text if num_prompts == 1 else ["x", text, "y"]
    response = post(ScriptedEngine(), "/v1/completions", {"prompt": prompt})
    error = error_of(response, 400)
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    chat = {"messages": [{"role": "user", "content": text}]}
    error = error_of(post(ScriptedEngine(), "/v1/chat/completions", chat), 400)
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


def test_the_longest_text_that_may_fit_is_looked_at():
    """By the tokenizer; the error then knows how many tokens it has."""
    text = "x" * (100 * TOKENIZER.longest_token_bytes)
    error = error_of(post(ScriptedEngine(), "/v1/completions", {"prompt": text}), 400)
    assert "tokens (" in error["message"]
