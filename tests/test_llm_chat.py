"""LLM.chat: the prompts and the refusals that the server has for the same messages."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from fastserve import LLM, SamplingParams
from fastserve.checkpoint.locate import BUNDLED
from fastserve.text.tokenizer import Tokenizer
from tests import chat_templates as templates
from tests.fresh_cache import make_fresh_cache
from tests.server.scripted import ScriptedEngine, call, make_app

ONE = SamplingParams(temperature=0.0, max_tokens=1)
USER = {"role": "user", "content": "hi"}
TWO = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
FUNCTION = {"name": "weather", "arguments": '{"city": "Paris"}'}
CALL = {"id": "a", "type": "function", "function": FUNCTION}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """Load the bundled model once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", make_fresh_cache(tmp_path_factory.mktemp("cache")))
        with LLM("demo", num_device_blocks=64, num_threads=1) as loaded:
            yield loaded


def over_http(messages: Any, template: str | None, **options: Any) -> list[int] | str:
    """Return the ids that /tokenize answers, or its error message."""
    app = make_app(ScriptedEngine(), tokenizer=Tokenizer.load(BUNDLED, template))
    response = call(app, "POST", "/tokenize", json={"messages": messages, **options})
    answer = response.json()
    return answer["tokens"] if response.status_code == 200 else answer["error"]["message"]


def offline(llm: LLM, messages: Any, template: str | None, **options: Any) -> list[int] | str:
    """Return the ids of LLM.chat's prompt, or the message of its ValueError."""
    try:
        (output,) = llm.chat(messages, ONE, use_tqdm=False, chat_template=template, **options)
    except ValueError as error:
        return str(error)
    return output.prompt_token_ids


@pytest.mark.parametrize("template", [None, templates.TRIM, templates.PARTS, templates.CALLS_JSON])
@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [{"role": "system", "content": TWO}, {"role": "user", "content": TWO}],
        [{"role": "developer", "content": "Be brief."}, USER],
        [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
        [USER, {"role": "assistant", "function_call": FUNCTION}],
        [USER, {"role": "assistant", "content": "a", "reasoning": "why", "weight": 0}, USER],
        [{"role": "user", "content": ["bare", {"type": "input_text", "text": "part"}]}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": []}],
        [USER, {"role": "tool", "tool_call_id": "a", "content": TWO}],
        [],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [USER, 5],
        [{"content": "x"}],
        [{"role": 5, "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": {"type": "text"}}],
        [{"role": "user", "content": [5]}],
        [{"role": "user", "content": [{"text": "x"}]}],
        [{"role": "user", "content": [{"type": 5, "text": "x"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "user", "content": [{"type": "text", "text": "x", "refusal": 5}]}],
        [{"role": "user", "content": None}, {"role": 5}],
        [USER, {"role": "assistant", "tool_calls": ["x"]}],
        [USER, {"role": "assistant", "refusal": "No."}],
        [USER, {"role": "assistant", "refusal": 5}],
        USER,
        "hello",
    ],
)
def test_both_doors_make_the_same_prompt_or_refuse_in_the_same_words(llm, messages, template):
    """The same ids, or the same sentence."""
    assert offline(llm, messages, template) == over_http(messages, template)


@pytest.mark.parametrize(
    "options",
    [
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
        {"continue_final_message": True},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"messages": []}},
    ],
)
@pytest.mark.parametrize("content", ["hi ", TWO])
def test_both_doors_have_the_same_options(llm, options, content):
    """The generation prompt, a message to be continued, a template's own variables."""
    messages = [USER, {"role": "assistant", "content": content}]
    assert offline(llm, messages, None, **options) == over_http(messages, None, **options)


def test_a_conversation_is_the_one_that_get_tokenizer_makes(llm):
    """So that prompts can be counted before they are sent."""
    messages = [{"role": "system", "content": TWO}, USER]
    tokenizer = llm.get_tokenizer()
    assert tokenizer is llm.get_tokenizer()
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert offline(llm, messages, None) == expected["input_ids"]


def test_tools_reach_the_template(llm):
    """Their calls are in the text."""
    tools = [{"type": "function", "function": {"name": "weather"}}]
    template = "{{ tools | tojson if tools else 'none' }}"
    for given, text in ((tools, '"weather"'), ([], "none"), (None, "none")):
        (output,) = llm.chat([USER], ONE, use_tqdm=False, chat_template=template, tools=given)
        assert text in output.prompt


def test_a_template_may_be_a_file(llm, tmp_path):
    """A name that is no template is never taken for one."""
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}!")
    (output,) = llm.chat([USER], ONE, False, chat_template=str(tmp_path / "mine.jinja"))
    assert output.prompt == "hi!"
    with pytest.raises(ValueError, match="no such file"):
        llm.chat([USER], ONE, False, chat_template="mine.jinja")


def test_chat_takes_what_vllms_takes_in_its_order(llm):
    """Also by position; what asks for nothing passes, and what cannot be honoured is named."""
    names = list(inspect.signature(LLM.chat).parameters)
    assert names[1:] == [
        "messages", "sampling_params", "use_tqdm", "lora_request", "chat_template",
        "chat_template_content_format", "add_generation_prompt", "continue_final_message",
        "tools", "chat_template_kwargs", "tokenization_kwargs", "mm_processor_kwargs",
    ]  # fmt: skip
    (output,) = llm.chat([USER], ONE, False, None, None, "auto", True, False, None, None, {}, None)
    assert output.prompt_token_ids == offline(llm, [USER], None)
    for name in ("lora_request", "tokenization_kwargs", "mm_processor_kwargs"):
        with pytest.raises(ValueError, match=f"{name} is not supported"):
            llm.chat([USER], ONE, False, **{name: {"a": 1}})


@pytest.mark.parametrize("messages", ["hello", USER, [[]], [[USER], []], [[USER], "hello"], None])
def test_what_is_no_conversation_is_refused(llm, messages):
    """Also where it is one of several."""
    with pytest.raises(ValueError, match="messages"):
        llm.chat(messages, ONE, use_tqdm=False)


def test_a_stream_of_a_conversation_has_its_prompt(llm):
    """Parts, and what is refused of them, as in `chat`."""
    messages = [{"role": "user", "content": TWO}]
    text = "".join(llm.stream(messages, ONE))
    assert text == llm.chat(messages, ONE, use_tqdm=False)[0].outputs[0].text
    with pytest.raises(ValueError, match="'image_url' are not supported"):
        next(llm.stream([{"role": "user", "content": [{"type": "image_url"}]}], ONE))
