"""From a request's prompt or messages to token ids.

Rules: long texts are encoded on threads, and templates rendered in other processes, so that they
hold no other request up; a text that cannot fit is not encoded at all. Ids are checked here: what
leaves is a prompt the model can embed.
Must not know: sampling, answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastserve.frontend import request_checks
from fastserve.server.context import ServerContext
from fastserve.server.errors import invalid
from fastserve.server.protocol import ChatMessage, CompletionRequest
from fastserve.text.chat_messages import check_request_variables
from fastserve.text.tokenizer import Tokenizer
from fastserve.wire.engine_messages import EngineInfo


class Prompt(NamedTuple):
    """Token ids, and the text they come from where there was one."""

    token_ids: list[int]
    text: str | None = None


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
        for text in given:
            check_text(text, tokenizer, info, "prompt")
        prompts = await context.text_pool.run(
            sum(map(len, given)),
            lambda: [Prompt(tokenizer.encode(text, adds), text) for text in given],
        )
    else:
        prompts = [Prompt(ids) for ids in given]
    return prompts


def least_size(body: CompletionRequest) -> tuple[int, int]:
    """Return how many prompts there are, and the tokens of them that can be told without a look.

    A text may be one token.
    """
    prompt = body.prompt
    if isinstance(prompt, str):
        return 1, 1
    if prompt and isinstance(prompt[0], int):
        return 1, len(prompt)
    return len(prompt), sum(len(one) if isinstance(one, list) else 1 for one in prompt)


def check_text(text: str, tokenizer: Tokenizer, info: EngineInfo, part: str) -> None:
    """Raise 400 for a text that is longer than a window full of the longest tokens there are."""
    limit = info.max_model_len * tokenizer.longest_token_bytes
    if 4 * len(text) <= limit:  # a character has four bytes at most
        return
    num_bytes = len(text.encode(errors="surrogatepass"))
    if num_bytes > limit:
        raise invalid(
            f"This model's maximum context length is {info.max_model_len} tokens. However, there "
            f"are {num_bytes} bytes in the {part}, which are more tokens than that. Please reduce "
            f"the length of the {part}.",
            part,
            "context_length_exceeded",
        )


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise 400 for an id outside the vocabulary."""
    try:
        request_checks.check_token_ids(ids, vocab_size, param)
    except request_checks.RequestError as error:
        raise invalid(str(error), param) from error


async def chat_prompt(
    messages: Sequence[ChatMessage],
    context: ServerContext,
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    add_special_tokens: bool | None,
    variables: dict[str, Any] | None,
    info: EngineInfo | None = None,
) -> Prompt:
    """Return the prompt that the chat template makes of messages; with `info`, if that may fit."""
    tokenizer = context.require_tokenizer("messages")
    rendering = context.require_rendering()
    try:
        check_request_variables(variables)
    except ValueError as error:
        raise invalid(str(error), "chat_template_kwargs") from error
    plain = [message.model_dump(exclude_unset=True) for message in messages]
    size = sum(map(num_chars, plain))
    marked, marked_variables = await context.text_pool.run(
        size, lambda: tokenizer.guard.mark([plain, variables or {}])
    )
    try:
        text = await rendering.render(
            marked,
            add_generation_prompt=add_generation_prompt is not False,
            continue_final_message=bool(continue_final_message),
            variables=marked_variables,
        )
        if info is not None:
            check_text(tokenizer.guard.unmark(text), tokenizer, info, "messages")
        prompt = await context.text_pool.run(
            len(text), lambda: tokenizer.chat_prompt(text, bool(add_special_tokens))
        )
    except ValueError as error:
        raise invalid(str(error), "messages") from error
    return Prompt(prompt.token_ids, prompt.text)


def num_chars(value: Any) -> int:
    """Count, roughly, the characters in a JSON value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(name) + num_chars(item) for name, item in value.items())
    return sum(map(num_chars, value)) if isinstance(value, list) else 1
