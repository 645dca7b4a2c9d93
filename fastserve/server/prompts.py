"""From a request's prompt or messages to token ids.

Rules: long texts are encoded on a thread, so that they hold nobody up. Ids are checked here: what
leaves is a prompt the model can embed. Must not know: sampling, answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from fastserve.chat_template import ChatTemplateError
from fastserve.engine.messages import EngineInfo
from fastserve.server.context import ServerContext
from fastserve.server.errors import invalid
from fastserve.server.protocol import ChatMessage, CompletionRequest, ContentPart
from fastserve.tokenizer import Tokenizer

T = TypeVar("T")

LONG_TEXT = 4096  # characters from which encoding is worth a thread
RESERVED_VARIABLES = ("messages", "add_generation_prompt", "continue_final_message")


class Prompt(NamedTuple):
    """Token ids, and the text they come from where there was one."""

    token_ids: list[int]
    text: str | None = None


async def off_loop(num_chars: int, work: Callable[[], T]) -> T:
    """Run `work`, on a thread when it is about many characters."""
    return work() if num_chars < LONG_TEXT else await asyncio.to_thread(work)


async def completion_prompts(
    body: CompletionRequest, context: ServerContext, info: EngineInfo
) -> list[Prompt]:
    """Return every prompt of a completion request."""
    given: Any = body.prompt
    if given == []:
        raise invalid("prompt must not be empty.", "prompt")
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    if isinstance(given[0], str):
        tokenizer = context.require_tokenizer("prompt")
        adds = body.add_special_tokens is not False
        prompts = [Prompt(await encode(tokenizer, text, adds), text) for text in given]
    else:
        prompts = [Prompt(ids) for ids in given]
    for prompt in prompts:
        check_token_ids(prompt.token_ids, info.vocab_size, "prompt")
        if not prompt.token_ids:
            raise invalid("prompt must have at least one token.", "prompt")
    return prompts


def num_prompts(body: CompletionRequest) -> int:
    """Count the prompts of a completion request before anything is done about them."""
    prompt = body.prompt
    return 1 if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else len(prompt)


async def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Return the ids of a text."""
    return await off_loop(len(text), lambda: tokenizer.encode(text, add_special_tokens))


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise 400 for an id outside the vocabulary."""
    if ids and (max(ids) >= vocab_size or min(ids) < 0):
        worst = max(ids) if max(ids) >= vocab_size else min(ids)
        raise invalid(f"Token id {worst} is out of vocabulary (0 to {vocab_size - 1}).", param)


async def chat_prompt(
    messages: Sequence[ChatMessage],
    context: ServerContext,
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    add_special_tokens: bool | None,
    variables: dict[str, Any] | None,
) -> Prompt:
    """Return the prompt that the chat template makes of messages."""
    tokenizer = context.require_tokenizer("messages")
    if not messages:
        raise invalid("messages must not be empty.", "messages")
    chosen = variables or {}
    for name in RESERVED_VARIABLES:
        if name in chosen:
            raise invalid(f"chat_template_kwargs must not set {name}.", "chat_template_kwargs")
    values = {str(name): value for name, value in chosen.items()}
    plain = [plain_message(message) for message in messages]

    def make() -> Prompt:
        text = tokenizer.apply_chat_template(
            plain,
            add_generation_prompt=add_generation_prompt is not False,
            continue_final_message=bool(continue_final_message),
            **values,
        )
        return Prompt(tokenizer.encode(text, bool(add_special_tokens)), text)

    try:
        prompt = await off_loop(sum(len(message["content"]) for message in plain), make)
    except ChatTemplateError as error:
        raise invalid(str(error), "messages") from error
    if not prompt.token_ids:
        raise invalid("The chat template makes no prompt of these messages.", "messages")
    return prompt


def plain_message(message: ChatMessage) -> dict[str, Any]:
    """Return a message as templates read it: its text parts joined, its other fields kept."""
    values = message.model_dump(exclude_none=True)
    content = message.content
    if content is None:
        if message.role != "assistant":
            raise invalid(f"A message of role {message.role!r} must have content.", "messages")
        content = ""
    if not isinstance(content, str):
        content = "\n".join(part_text(part) for part in content)
    values["content"] = content
    return values


def part_text(part: ContentPart) -> str:
    """Return the text of a part; 400 for a part that is none."""
    if part.type not in ("text", "input_text"):
        raise invalid(
            f"Content parts of type {part.type!r} are not supported; this model reads text.",
            "messages",
        )
    if part.text is None:
        raise invalid(f"A content part of type {part.type!r} must have text.", "messages")
    return part.text
