"""What clients send: OpenAI's request bodies with vLLM's extra fields.

Rules: types only, and strictly: "10" is no number and true is not 1. Values are judged in
admission.py, where the engine's limits are known. Fields that are not here are kept aside;
refused_fields.py says which of them are refused.
Must not know: the engine, the tokenizer.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from annotated_types import Ge, Lt, MaxLen
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    StrictInt,
    StrictStr,
    Tag,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)


class FirstFault(FailFast):
    """Ends validation of a list at its first fault; hashable, as members of a union must be."""

    __hash__ = object.__hash__


def whole(value: Any) -> Any:
    """Read 2.0 as 2: JSON knows one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def key_id(value: Any) -> Any:
    """Read the key of an object as an id: it cannot be but a string."""
    is_id = isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value)
    return int(value) if is_id else value


Int64 = Annotated[int, BeforeValidator(whole), Ge(-(2**63)), Lt(2**63)]
MAX_LIST_ITEMS = 2**13  # of prompts, messages and parts of them


def plain_ids(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Take a list of ids as a whole: there may be many, and looking at each takes long."""
    is_plain = type(value) is list and value and set(map(type, value)) == {int}
    is_plain = is_plain and min(value) >= 0 and max(value) < 2**63
    return value if is_plain else validate(value)


IdKey = Annotated[int, BeforeValidator(key_id)]
TokenIds = Annotated[
    list[Annotated[StrictInt, Ge(0), Lt(2**63)]], FirstFault(), WrapValidator(plain_ids)
]
Few = MaxLen(MAX_LIST_ITEMS)


def kind_of_prompt(value: Any) -> str:
    """Tell the four kinds of prompt apart by the first item, so that errors are about one kind."""
    if not isinstance(value, list) or not value:
        return "as string" if not isinstance(value, list) else "as token ids"
    if isinstance(value[0], str):
        return "as strings"
    return "as lists of token ids" if isinstance(value[0], list) else "as token ids"


Prompt = Annotated[
    Annotated[StrictStr, Tag("as string")]
    | Annotated[Annotated[list[StrictStr], FirstFault(), Few], Tag("as strings")]
    | Annotated[TokenIds, Tag("as token ids")]
    | Annotated[Annotated[list[TokenIds], FirstFault(), Few], Tag("as lists of token ids")],
    Discriminator(kind_of_prompt),
]


def kind_of_text(value: Any) -> str:
    """Tell one string from a list."""
    return "as list" if isinstance(value, list) else "as string"


def off_is_none(value: Any) -> Any:
    """Read false as no logprobs at all, and true as 1, as vLLM does."""
    return (1 if value else None) if isinstance(value, bool) else value


class Body(BaseModel):
    """Any request body."""

    model_config = ConfigDict(
        extra="allow", strict=True, protected_namespaces=(), hide_input_in_errors=True
    )


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(Body):
    """What completions and chat have in common: how to draw tokens, and what to return."""

    model: StrictStr | None = None
    n: Int64 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Int64 | None = None
    logit_bias: dict[IdKey, float] | None = None
    max_tokens: Int64 | None = None
    min_tokens: Int64 | None = None
    ignore_eos: bool | None = None
    stop: (
        Annotated[
            Annotated[StrictStr, Tag("as string")]
            | Annotated[Annotated[list[StrictStr], FirstFault()], Tag("as list")],
            Discriminator(kind_of_text),
        ]
        | None
    ) = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: Int64 | None = None
    priority: Int64 | None = None
    user: StrictStr | None = None
    cache_salt: StrictStr | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_metrics: bool | None = None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[Int64 | None, BeforeValidator(off_is_none)] = None
    best_of: Int64 | None = None


def kind_of_part(value: Any) -> str:
    """Tell a bare text from a part."""
    return "as string" if isinstance(value, str) else "as part"


class ContentPart(Body):
    """One part of a message; text, and a refusal, are the only kinds that are understood."""

    type: StrictStr
    text: StrictStr | None = None
    refusal: StrictStr | None = None


Part = Annotated[
    Annotated[StrictStr, Tag("as string")] | Annotated[ContentPart, Tag("as part")],
    Discriminator(kind_of_part),
]


class ChatMessage(Body):
    """One message; fields that are not here reach the template."""

    role: StrictStr
    content: (
        Annotated[
            Annotated[StrictStr, Tag("as string")]
            | Annotated[Annotated[list[Part], FirstFault(), Few], Tag("as list")],
            Discriminator(kind_of_text),
        ]
        | None
    ) = None


class ChatInput(Body):
    """Messages, and how to make a prompt of them."""

    messages: Annotated[list[ChatMessage], FirstFault(), Few]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatCompletionRequest(ChatInput, GenerationRequest):
    """POST /v1/chat/completions."""

    logprobs: bool | None = None
    top_logprobs: Int64 | None = None
    max_completion_tokens: Int64 | None = None


class TokenizeRequest(Body):
    """POST /tokenize: a text, or the messages of a chat."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: Annotated[list[ChatMessage], FirstFault(), Few] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: StrictStr | None = None
    tokens: TokenIds
