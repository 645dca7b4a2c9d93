"""What templates get of messages: a table of templates and forms of content, calls, roles."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from fastserve.text.chat_renderer import ChatRenderer
from tests import chat_templates as templates

TWO = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
STRINGS_ONLY = ("STRING", "TRIM", "CONCATENATED")
PARTS_TOO = ("BOTH", "MACRO", "MIXED", "USER_PARTS")
PARTS_ONLY = ("PARTS", "SMOLVLM")


def render(source: str, *messages: Any, **options: Any) -> str:
    """Return the prompt of a conversation."""
    return ChatRenderer(source, {}).render(list(messages), add_generation_prompt=False, **options)


def user(content: Any) -> dict[str, Any]:
    """Return a user's message."""
    return {"role": "user", "content": content}


@pytest.mark.parametrize("name", [*STRINGS_ONLY, *PARTS_TOO, *PARTS_ONLY, "FIRST_PART"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("hello", "hello"),
        ([{"type": "text", "text": "hello"}], "hello"),
        ([{"type": "input_text", "text": "hello"}], "hello"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
        (["hello"], "hello"),
        ("", ""),
        ([], ""),
        ([{"type": "text", "text": ""}], ""),
    ],
)
def test_every_form_of_content_reaches_every_template(name, content, text):
    """A template that reads only strings, only parts, or either, shows the same text."""
    assert render(getattr(templates, name), user(content)) == f"<user>{text}"


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (STRINGS_ONLY, "one\ntwo"),
        (("FIRST_PART",), "one\ntwo"),
        (PARTS_TOO, "onetwo"),
        (PARTS_ONLY, "onetwo"),
    ],
)
def test_two_parts_are_the_templates_to_join(names, text):
    """One that reads all the parts gets them; for the others they are lines of one text."""
    for name in names:
        assert render(getattr(templates, name), user(TWO)) == f"<user>{text}", name


def test_each_role_gets_the_form_that_is_read_of_it():
    """A system's parts are a string where the template reads parts of users alone."""
    system = {"role": "system", "content": TWO}
    assert render(templates.MIXED, system, user(TWO)) == "<system>one\ntwo<user>onetwo"
    answer = {"role": "assistant", "content": TWO}
    tool = {"role": "tool", "tool_call_id": "a", "content": TWO}
    text = render(templates.USER_PARTS, user(TWO), answer, tool)
    assert text == "<user>onetwo<assistant>one\ntwo<tool>one\ntwo"


@pytest.mark.parametrize(
    ("content_format", "text"),
    [("string", "one\ntwo"), ("openai", "onetwo"), ("auto", "onetwo")],
)
def test_the_form_of_content_can_be_forced(content_format, text):
    """As vLLM's chat_template_content_format does."""
    assert render(templates.BOTH, user(TWO), content_format=content_format) == f"<user>{text}"


def test_an_unknown_form_of_content_is_refused():
    """By its name and with those there are."""
    with pytest.raises(ValueError, match=r"chat_template_content_format must be one of auto, str"):
        render(templates.BOTH, user("x"), content_format="json")


@pytest.mark.parametrize("name", [*STRINGS_ONLY, *PARTS_TOO, *PARTS_ONLY])
@pytest.mark.parametrize("message", [{"role": "assistant"}, {"role": "assistant", "content": None}])
def test_an_assistant_without_content_has_an_empty_one(name, message):
    """And never the word None."""
    text = render(getattr(templates, name), user("a"), message)
    assert text == "<user>a<assistant>"


def test_a_refusal_is_what_an_assistant_said():
    """Where there is no content beside it."""
    refused = {"role": "assistant", "content": None, "refusal": "No."}
    assert render(templates.STRING, user("a"), refused) == "<user>a<assistant>No."
    refused |= {"content": "Yes.", "refusal": None}
    assert render(templates.STRING, user("a"), refused) == "<user>a<assistant>Yes."


@pytest.mark.parametrize("name", [*STRINGS_ONLY, *PARTS_TOO, *PARTS_ONLY])
@pytest.mark.parametrize("content", ["On", TWO])
def test_the_last_message_can_be_continued_in_every_form(name, content):
    """The prompt ends with its text."""
    text = render(
        getattr(templates, name),
        user("a"),
        {"role": "assistant", "content": content},
        continue_final_message=True,
    )
    assert text.startswith("<user>a<assistant>")
    assert text.endswith("On" if content == "On" else "two")


# ── tool calls ───────────────────────────────────────────────────────────────────────────────


def call(arguments: Any, **fields: Any) -> dict[str, Any]:
    """Return an assistant's message with one call."""
    function = {"name": "weather", "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"id": "a", "type": "function", "function": function}],
        **fields,
    }


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("CALLS_JSON", '{"city": "Paris"}'),
        ("CALLS_ITEMS", "city=Paris;"),
        ("CALLS_TEXT", '{"city": "Paris"}'),
        ("CALLS_PRINTED", '{"city": "Paris"}'),
        ("CALLS_WITHOUT_CONTENT", '{"city": "Paris"}'),
    ],
)
@pytest.mark.parametrize("arguments", ['{"city": "Paris"}', {"city": "Paris"}])
@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_arguments_are_encoded_once(name, shown, arguments, content):
    """Whether the template encodes them, walks through them, or wants them as text."""
    text = render(getattr(templates, name), user("a"), call(arguments, **content))
    assert text == f"<user>a<assistant>weather({shown})"


@pytest.mark.parametrize("arguments", ["", None, {}, "{}"])
@pytest.mark.parametrize("name", ["CALLS_JSON", "CALLS_TEXT"])
def test_no_arguments_are_an_empty_object(name, arguments):
    """As models and clients spell them."""
    assert render(getattr(templates, name), user("a"), call(arguments)).endswith("weather({})")


@pytest.mark.parametrize(
    "arguments", ["{", "[1]", "5", '"x"', "null", [1], 5, "[" * 100_000, '{"a": 1} x']
)
@pytest.mark.parametrize("name", ["CALLS_JSON", "CALLS_TEXT"])
def test_arguments_that_are_no_object_become_an_empty_one(name, arguments, caplog):
    """They stay in a conversation, which a refusal would end for good; the log says so."""
    with caplog.at_level(logging.WARNING):
        text = render(getattr(templates, name), user("a"), call(arguments))
    assert text.endswith("weather({})")
    assert "'weather' are no JSON object" in caplog.text


def test_a_call_may_name_its_function_itself():
    """Without the object around it, as some clients and templates have it."""
    source = (
        "{% for m in messages %}{% for tool_call in m.tool_calls %}"
        "{% if tool_call.function is defined %}{% set tool_call = tool_call.function %}{% endif %}"
        "{{ tool_call.name }}{{ tool_call.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    flat = {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": '{"a": 1}'}]}
    assert render(source, user("a"), flat) == 'weather{"a": 1}'


def test_a_call_of_the_older_api_is_a_tool_call():
    """`function_call`, and the answer of role `function`."""
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    text = render(
        templates.CALLS_JSON,
        user("a"),
        {"role": "assistant", "content": None, "function_call": function},
        {"role": "function", "name": "weather", "content": "rain"},
    )
    assert text == '<user>a<assistant>weather({"city": "Paris"})<tool>rain'


@pytest.mark.parametrize("calls", [None, []])
def test_no_tool_calls_are_no_field(calls):
    """A template may ask whether there is one."""
    source = "{% for m in messages %}{{ 'tool_calls' in m }}{% endfor %}"
    message = {"role": "assistant", "content": "b", "tool_calls": calls}
    assert render(source, user("a"), message) == "FalseFalse"


def test_the_callers_messages_stay_as_they_are():
    """Calls and parts in them too."""
    messages = [user(TWO), call('{"a": 1}')]
    before = repr(messages)
    render(templates.CALLS_JSON, *messages)
    assert repr(messages) == before


# ── roles and other fields ───────────────────────────────────────────────────────────────────

STRICT = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "role"),
    [
        (STRICT, "system"),
        (templates.STRING, "system"),
        (STRICT.replace("'tool'", "'developer'"), "developer"),
        ("{% set role = messages[0]['role'] %}{% if role == 'developer' %}<{{ role }}>x{% endif %}",
         "developer"),
    ],
)  # fmt: skip
def test_a_developer_is_a_system_where_the_template_knows_none(source, role):
    """One that names the role gets it as it is."""
    assert render(source, {"role": "developer", "content": "x"}) == f"<{role}>x"


@pytest.mark.parametrize("given", ["reasoning", "reasoning_content"])
def test_reasoning_has_both_its_names(given):
    """A template reads either."""
    source = "{% for m in messages %}{{ m.reasoning }}{{ m.reasoning_content }}{% endfor %}"
    message = {"role": "assistant", "content": "b", given: "why"}
    assert render(source, user("a"), message) == "whywhy"


def test_two_different_reasonings_stay():
    """Neither replaces the other."""
    source = "{{ messages[0].reasoning }}{{ messages[0].reasoning_content }}"
    message = {"role": "assistant", "content": "b", "reasoning": "1", "reasoning_content": "2"}
    assert render(source, message) == "12"


def test_other_fields_reach_the_template_and_nulls_do_not():
    """`name`, `tool_call_id`, and what OpenAI does not know."""
    source = "{% set m = messages[0] %}{{ m.name }}{{ m.tool_call_id }}{{ m.weight }}{{ 'x' in m }}"
    message = {
        "role": "tool", "content": "a", "name": "n", "tool_call_id": "t", "weight": 2, "x": None,
    }  # fmt: skip
    assert render(source, message) == "nt2False"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages must not be empty."),
        ("hello", "messages: Input should be a valid array."),
        ([user("a"), 5], "messages[1]: Input should be an object."),
        ([{}], "messages[0].role: Field required."),
        ([user("a"), user(None)], "A message of role 'user' must have content."),
        ([{"role": "tool"}], "A message of role 'tool' must have content."),
        ([user({"type": "text"})], "messages[0].content: Input should be a valid string."),
        ([user([{"type": "text"}])], "A content part of type 'text' must have text."),
        ([user([{"type": "refusal", "text": "a"}])], "must have refusal."),
        ([user([{"text": "a"}])], "messages[0].content[0].type: Field required."),
        ([user(["a", 5])], "messages[0].content[1]: Input should be an object."),
        ([user([{"type": "image_url", "image_url": {"url": "x"}}])], "'image_url' are not supp"),
        ([user([{"type": "input_audio"}])], "'input_audio' are not supported"),
        ([user([*TWO, {"type": "file"}])], "'file' are not supported"),
        ([{"role": "assistant", "tool_calls": 5}], "messages[0].tool_calls: Input should be"),
        ([{"role": "assistant", "tool_calls": [5]}], "messages[0].tool_calls[0]: only calls"),
        ([{"role": "assistant", "tool_calls": [{"type": "custom"}]}], "only calls of type"),
        ([{"role": "assistant", "tool_calls": [{"id": "a"}]}], "must have a function"),
        ([{"role": "assistant", "function_call": "x"}], "messages[0].function_call: a call"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_in_words(messages, says):
    """Never dropped, and never in the prompt as Python shows it."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the words are what is tested
        ChatRenderer(templates.STRING, {}).render(messages)
    assert says in str(caught.value)


def test_what_is_the_servers_to_set_is_refused_as_a_variable():
    """Whatever the door."""
    for name in ("messages", "add_generation_prompt", "continue_final_message"):
        with pytest.raises(ValueError, match=f"chat_template_kwargs must not set {name}"):
            render(templates.STRING, user("a"), variables={name: []})
    assert render("{{ content_format }}", user("a"), variables={"content_format": 1}) == "1"
