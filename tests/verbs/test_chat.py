"""`fastserve generate` and `fastserve chat` with the bundled model."""

from __future__ import annotations

import builtins
import io
import itertools
import sys

import pytest

from fastserve import cli
from fastserve.llm import LLM
from fastserve.text.chat_renderer import ChatRenderer
from fastserve.verbs.chat import ROOM_FOR_A_TURN, converse, num_tokens
from fastserve.verbs.config import TextConfig

WINDOW = 128


@pytest.fixture(scope="module")
def llm():
    """Load the bundled model with a small window."""
    with LLM("demo", max_model_len=WINDOW, max_num_seqs=2) as loaded:
        yield loaded


@pytest.fixture
def say(monkeypatch, llm):
    """Return a function that holds a conversation and returns what the model was sent."""

    def hold(*lines, max_tokens=4, system=None):
        typed = iter(lines)
        sent = []

        def read(prompt):
            line = next(typed, EOFError)
            if not isinstance(line, str):
                raise line
            return line

        def stream(messages, params):
            sent.append(messages)
            return LLM.stream(llm, messages, params)

        monkeypatch.setattr(builtins, "input", read)
        monkeypatch.setattr(llm, "stream", stream)
        params = cli.sampling_params(llm, TextConfig(max_tokens=max_tokens, temperature=0.0))
        assert converse(llm, params, system=system) == 0
        return sent

    return hold


def roles(messages):
    """Return who spoke, in order."""
    return [message["role"] for message in messages]


def test_history_grows_with_every_turn(say):
    """Each turn sends everything said before, the answers included."""
    sent = say("hello", "and then", "/exit", "never")
    assert [roles(messages) for messages in sent] == [
        ["user"],
        ["user", "assistant", "user"],
    ]
    assert sent[1][0] == {"role": "user", "content": "hello"}


def test_reset_keeps_the_system_message(say):
    """/reset forgets the turns, not the instructions; empty lines are not turns."""
    sent = say("hello", "", "/reset", "again", system="Be brief.")
    assert [roles(messages) for messages in sent] == [["system", "user"], ["system", "user"]]
    assert sent[1][1]["content"] == "again"


def test_the_model_is_named_before_the_first_line(say, capsys):
    """Which model answers, on what, and how much it can see; then how to get on."""
    say()
    first, hint, *_ = capsys.readouterr().out.splitlines()
    assert first == f"demo, float32 on cpu, a window of {WINDOW}."
    assert "/help" in hint


@pytest.mark.parametrize("command", ["/quit", "/exit", " /quit "])
def test_commands_that_end(say, command):
    """What follows is not read."""
    assert say(command, "never") == []


def test_help_lists_the_commands(say, capsys):
    """A line for each, and nothing is sent."""
    assert say("/help") == []
    said = capsys.readouterr().out
    for command in ("/reset", "/quit", "/help", "Ctrl-C"):
        assert f"\n{command} " in said


@pytest.mark.parametrize("command", ["/qiut", "/etc/hosts what is it?", "/"])
def test_an_unknown_command_is_not_sent(say, capsys, command):
    """A mistyped command is one line with a hint, not a message to the model."""
    assert say(command) == []
    complaints = [line for line in capsys.readouterr().out.splitlines() if "no command" in line]
    assert len(complaints) == 1
    assert complaints[0].startswith(f"(no command {command.split()[0]}. ")
    assert "/help" in complaints[0]


def test_a_line_that_is_no_text_is_not_sent(monkeypatch, llm, capsys):
    """Bytes that are not UTF-8 cost their own line and no other of the same read."""
    piped = io.TextIOWrapper(io.BytesIO(b"hello\n\xff\xfe\nagain\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", piped)
    params = cli.sampling_params(llm, TextConfig(max_tokens=2, temperature=0.0))
    assert converse(llm, params) == 0
    said = capsys.readouterr().out
    assert said.count("(not sent: this is not UTF-8 text)") == 1
    assert said.count("you> ") == 4


def test_a_system_message_that_is_no_text_is_refused(say):
    """Arguments may be any bytes."""
    with pytest.raises(ValueError, match="--system: not UTF-8"):
        say("hello", system="\udcff")


def refusing(llm, monkeypatch, template):
    """Give a model's tokenizer another template."""
    renderer = None if template is None else ChatRenderer(template, {})
    monkeypatch.setattr(llm._tokenizer, "_chat", renderer)
    monkeypatch.setattr(llm.get_tokenizer(), "chat_template", template)


def test_a_model_that_cannot_chat_says_so_at_once(say, monkeypatch, llm):
    """Before the first line is read, not after it was typed."""
    refusing(llm, monkeypatch, None)
    with pytest.raises(ValueError, match="no chat template"):
        say(RuntimeError("read a line"))


def test_a_message_that_the_template_refuses_costs_only_itself(say, monkeypatch, llm, capsys):
    """The reason is one line and the conversation stays as it was."""
    refusing(
        llm, monkeypatch,
        "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no bad') }}"
        "{% endif %}{{ m.content }}{% endfor %}",
    )  # fmt: skip
    sent = say("bad", "good", "better")
    assert [roles(messages) for messages in sent] == [["user"], ["user", "assistant", "user"]]
    assert "(not sent: The chat template failed: no bad)" in capsys.readouterr().out


def test_a_template_may_refuse_a_conversation_that_ends_with_an_answer(say, monkeypatch, llm):
    """What is left of the window is counted without it."""
    refusing(
        llm, monkeypatch,
        "{% if messages[-1].role != 'user' %}{{ raise_exception('a user last') }}{% endif %}"
        "{{ messages[-1].content }}",
    )  # fmt: skip
    assert len(say("hello", "again")) == 2


def test_an_interrupt_at_the_prompt_asks_again(say):
    """Ctrl-C drops the line, not the conversation."""
    assert len(say(KeyboardInterrupt, "hello")) == 1


def test_a_message_beyond_the_window_is_not_sent(say, capsys):
    """One clear line, and the conversation stays as it was."""
    sent = say("hello", "word " * 2 * WINDOW, "short")
    assert f"would not fit the window of {WINDOW}" in capsys.readouterr().out
    assert roles(sent[-1]) == ["user", "assistant", "user"]
    assert sent[-1][-1]["content"] == "short"


def test_a_window_that_is_nearly_full_is_announced(say, capsys, llm):
    """The answer is cut at the window whatever --max-tokens asks, and what is left is told."""
    text = "word "
    while num_tokens(llm, [{"role": "user", "content": text}]) < WINDOW - ROOM_FOR_A_TURN:
        text += "word "
    assert len(say(text, max_tokens=10 * WINDOW)) == 1
    said = capsys.readouterr().out
    assert f"of the window's {WINDOW} tokens are left" in said
    assert "/reset starts over" in said.rstrip().splitlines()[-1]
    say("hello")
    assert "tokens are left" not in capsys.readouterr().out


def test_an_interrupted_answer_is_kept(monkeypatch, say, llm, capsys):
    """Ctrl-C stops an answer; what was said of it is part of the conversation."""
    sent = []

    def stream(messages, params):
        sent.append(messages)
        yield from itertools.islice(LLM.stream(llm, messages, params), 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm, "stream", stream)
    lines = iter(["a", "b", "/exit"])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    params = cli.sampling_params(llm, TextConfig(max_tokens=8, temperature=0.0))
    assert converse(llm, params) == 0
    assert capsys.readouterr().out.count("(stopped)") == 2
    assert roles(sent[1]) == ["user", "assistant", "user"]
    assert sent[1][1]["content"]


def test_flags_lie_on_top_of_the_model_s_own_sampling(llm):
    """What is not given stays as generation_config.json has it; the window bounds the answer."""
    own = llm.get_default_sampling_params()
    params = cli.sampling_params(llm, TextConfig(top_k=7))
    assert (params.temperature, params.top_p) == (own.temperature, own.top_p)
    assert params.top_k == 7
    assert params.max_tokens is None


def test_generate_prints_the_answer(capsys):
    """The command prints the text and nothing else, the same text each time."""
    argv = ["generate", "Once upon", "--max-tokens", "6", "--seed", "5", "--max-model-len", "64"]
    assert cli.main(argv) == 0
    first = capsys.readouterr().out
    assert first.strip()
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == first


def test_generate_refuses_what_cannot_fit(capsys):
    """A prompt beyond the window is one line and exit code 2."""
    argv = ["generate", "Once upon " * 64, "--max-tokens", "64", "--max-model-len", "64"]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fastserve: error: ")
    assert "maximum context length is 64 tokens" in error
