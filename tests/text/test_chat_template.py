"""ChatTemplate: what templates may use, what they may not, and how they fail."""

from __future__ import annotations

import copy
import pickle
import re
from datetime import datetime
from typing import Any

import pytest

from fastserve.text.chat_template import ChatTemplate, ChatTemplateError

USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages=USER, **variables) -> str:
    """Render with a special token."""
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **variables)


def test_special_tokens_variables_and_defaults_are_there():
    """The token, a variable of the request, and the two that are always defined."""
    source = "{{ bos_token }}{{ mood }}{{ tools is none }}{{ documents is none }}"
    assert render(source, mood="calm") == "<s>calmTrueTrue"


def test_variables_may_have_any_name():
    """A client chooses them; none is mistaken for an argument."""
    template = ChatTemplate("{{ self_ }}{{ messages[0].content }}", {})
    names: dict[str, Any] = {"self": 1, "self_": "a", "environment": 2, "values": 3, "chat": 4}
    assert template.render([{"role": "user", "content": "b"}], **names) == "ab"


def test_loop_controls_work():
    """Templates break out of loops."""
    assert (
        render("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{i}}{% endfor %}")
        == "012"
    )


def test_blocks_are_trimmed():
    """A block's own line leaves no trace."""
    assert render("a\n  {% if true %}\nb\n  {% endif %}\n") == "a\nb\n"


def test_tojson_escapes_no_html_and_keeps_unicode():
    """Unlike Jinja's own filter."""
    assert render("{{ x | tojson(indent=None) }}", x={"a": "<é>"}) == '{"a": "<é>"}'


def test_strftime_now_gives_today():
    """Templates that state the date."""
    days = {datetime.now().strftime("%Y-%m-%d")}
    text = render("{{ strftime_now('%Y-%m-%d') }}")
    days.add(datetime.now().strftime("%Y-%m-%d"))
    assert text in days


def test_generation_tags_are_transparent():
    """They mark what is trained on; the text is theirs too."""
    assert render("a{% generation %}b{{ 1 }}{% endgeneration %}c") == "ab1c"


def test_a_template_may_refuse_its_messages():
    """The message reaches the user."""
    with pytest.raises(ChatTemplateError, match="no such role"):
        render("{{ raise_exception('no such role') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].pop('role') }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ undefined_thing.attribute }}",
        "{{ 1 / 0 }}",
    ],
)
def test_escapes_and_faults_are_template_errors(source):
    """Neither reaches the interpreter nor ends the server."""
    with pytest.raises(ChatTemplateError):
        render(source)


OBJECTS = (
    "''", "[]", "{}", "1", "messages", "messages[0]", "namespace()", "raise_exception",
    "strftime_now", "range", "cycler", "joiner('a')", "lipsum", "dict", "(messages | map('upper'))",
    "self", "bos_token",
)  # fmt: skip
ESCAPES = (
    "{{ OBJ.__class__ }}", "{{ OBJ['__class__'] }}", "{{ OBJ | attr('__class__') }}",
    "{{ OBJ.__init__.__globals__ }}", "{{ OBJ.__globals__ }}", "{{ OBJ.__code__ }}",
    "{{ [OBJ] | map(attribute='__class__') | list }}", "{{ '{0.__class__}'.format(OBJ) }}",
    "{{ '{x.__class__}'.format_map({'x': OBJ}) }}", "{{ '{0.__init__.__globals__}'.format(OBJ) }}",
    "{% set x = OBJ.__dict__ %}{{ x }}",
)  # fmt: skip


@pytest.mark.parametrize("name", OBJECTS)
def test_no_way_leads_from_a_value_into_the_interpreter(name):
    """187 ways to a class, its globals or code; each is refused or comes to nothing."""
    for escape in ESCAPES:
        try:
            text = render(escape.replace("OBJ", name))
        except ChatTemplateError:
            continue
        assert not re.search("<class|<function|<module|<code|builtin|object at", text), escape


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "source",
    ["{{ 9 ** (9 ** 9) }}", "{{ 'x' * 10 ** 11 }}", "{{ 'x' | center(10 ** 11) }}",
     "{% set y = 9 ** (9 ** 9) %}", "{% if 9 ** (9 ** 9) %}{% endif %}", "{{ [9 ** (9 ** 9)] }}"],
)  # fmt: skip
def test_nothing_is_computed_while_a_template_is_compiled(source):
    """A model's template cannot hold its server up at the start."""
    ChatTemplate(source, {})


def test_the_callers_messages_stay_as_they_are():
    """Also when the last one is continued."""
    messages = [{"role": "assistant", "content": "Once"}]
    text = render(
        "[{{ messages[0].content }}]",
        messages,
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert text == "[Once"
    assert messages == [{"role": "assistant", "content": "Once"}]


@pytest.mark.parametrize(
    ("messages", "adds", "says"),
    [
        (USER, True, "exclude each other"),
        ([], False, "no final message"),
        ([{"role": "user"}], False, "no text"),
        (USER, False, "leaves out"),
    ],
)
def test_what_cannot_be_continued_is_refused(messages, adds, says):
    """Each with its reason."""
    with pytest.raises(ChatTemplateError, match=re.escape(says)):
        render("x", messages, add_generation_prompt=adds, continue_final_message=True)


@pytest.mark.parametrize(
    ("content", "kept", "trimmed"),
    [
        ("Once ", "Once ", "Once"),
        ("Once \n", "Once \n", "Once"),
        ("", "", ""),
        (" ", " ", ""),
        ("a\nb", "a\nb", "a\nb"),
    ],
)
def test_a_continued_message_ends_as_the_template_leaves_it(content, kept, trimmed):
    """Spaces at its end stay unless the template trims; those before it stay in any case."""
    for source, end in (
        ("{{ messages[0].content }}", kept),
        ("{{ messages[0].content | trim }}", trimmed),
    ):
        messages = [{"role": "assistant", "content": content}]
        text = render(
            "<assistant>\n\n" + source + "</s>",
            messages,
            add_generation_prompt=False,
            continue_final_message=True,
        )
        assert text == "<assistant>\n\n" + end


def test_a_template_can_be_copied():
    """Tokenizers are sent to other processes."""
    template = pickle.loads(pickle.dumps(ChatTemplate("{{ bos_token }}x", {"bos_token": "<s>"})))
    assert copy.deepcopy(template).render(USER) == "<s>x"
