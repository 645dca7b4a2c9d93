"""Chat messages → prompt text, by the Jinja template that a model brings.

Rules: a template is foreign code, so it runs in Jinja's immutable sandbox, sees plain JSON
values only, and cannot store private names. The helpers are those that templates are written for:
raise_exception, strftime_now, tojson, loop controls; `{% generation %}` marks are passed through.
Every failure is a ChatTemplateError with one line for the user. Must not know: ids, HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Private-use characters, which no message has. The space at the end tells, by being gone, that the
# template trims.
CONTINUE_MARK = "\ue000continue\ue001 "


class ChatTemplateError(ValueError):
    """A template that cannot be compiled, or that refuses or fails on these messages."""


class GenerationTag(Extension):
    """Renders the body of `{% generation %}`, a mark for training masks, as it stands."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # declared as a mutable set

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Return the nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class LateGenerator(CodeGenerator):
    """Computes nothing while a template is compiled, which may take as long as rendering it."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class SafeNamespace(Namespace):
    """Jinja's namespace without underscore-prefixed names, which reach into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=…)` is a valid call
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        """Store one attribute."""
        refuse_private(name)
        super().__setitem__(name, value)


def refuse_private(name: object) -> None:
    """Raise SecurityError for an underscore-prefixed name."""
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template cannot store the private name {name!r}")


def raise_exception(message: str) -> None:
    """Let a template refuse its messages."""
    raise TemplateError(message)


def strftime_now(pattern: str) -> str:
    """Return the local time, for templates that state the date."""
    return datetime.now().strftime(pattern)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class ChatTemplate:
    """One compiled template and the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, loopcontrols],
            optimized=False,
        )
        environment.code_generator_class = LateGenerator
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = strftime_now
        environment.globals["namespace"] = SafeNamespace
        self._source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
            self.roles_named = roles_named(environment.parse(source))
        except (TemplateError, RecursionError) as error:
            raise ChatTemplateError(f"The chat template cannot be compiled: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,  # a template's variables may have any name
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Return the prompt text for `messages`; raises ChatTemplateError."""
        chat = [dict(message) for message in messages]
        if continue_final_message:
            if add_generation_prompt:
                raise ChatTemplateError(
                    "add_generation_prompt and continue_final_message exclude each other."
                )
            if not chat:
                raise ChatTemplateError("There is no final message to be continued.")
            begun = last_text(chat[-1].get("content"))
            chat[-1]["content"] = marked(chat[-1]["content"])
        values = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **variables,
            "messages": chat,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render(values)
        except Exception as error:  # a template may fail in any way that Python code can
            reason = str(error) or type(error).__name__
            raise ChatTemplateError(f"The chat template failed: {reason}") from error
        if not continue_final_message:
            return text
        head, mark, tail = text.rpartition(CONTINUE_MARK.strip())
        if not mark:
            raise ChatTemplateError("The chat template leaves out the message to be continued.")
        if tail.startswith(" "):
            return head
        # The mark has kept the spaces before it, which the template would have trimmed.
        num_spaces = len(begun) - len(begun.rstrip()) if begun.strip() else 0
        return head[: len(head) - num_spaces]

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[str, dict[str, str]]]:
        return ChatTemplate, (self._source, self._special_tokens)


def last_text(content: Any) -> str:
    """Return the last text of a message's content, which is a string or parts."""
    text = content
    if isinstance(content, list) and content and isinstance(content[-1], Mapping):
        text = content[-1].get("text")
    if not isinstance(text, str):
        raise ChatTemplateError("There is no text in the final message to be continued.")
    return text


def marked(content: Any) -> Any:
    """Return a message's content with the mark at the end of its last text."""
    if isinstance(content, str):
        return content + CONTINUE_MARK
    return [*content[:-1], {**content[-1], "text": content[-1]["text"] + CONTINUE_MARK}]


def roles_named(tree: nodes.Template) -> frozenset[str]:
    """Return the strings that a template compares roles with."""
    names: set[object] = set()
    for comparison in tree.find_all(nodes.Compare):
        reads = comparison.find_all((nodes.Name, nodes.Getattr, nodes.Getitem))
        if any(reads_role(node) for node in reads):
            names.update(node.value for node in comparison.find_all(nodes.Const))
    return frozenset(name for name in names if isinstance(name, str))


def reads_role(node: nodes.Node) -> bool:
    """Whether an expression is a variable, an attribute or an item called `role`."""
    match node:
        case nodes.Name(name="role") | nodes.Getattr(attr="role"):
            return True
        case nodes.Getitem(arg=nodes.Const(value="role")):
            return True
    return False
