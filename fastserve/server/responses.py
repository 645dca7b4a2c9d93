"""What clients receive: OpenAI's response and chunk bodies with vLLM's extra fields.

Rules: msgspec structs, encoded once per write; a field that was not asked for is UNSET and left
out, one that OpenAI gives as null is None. Must not know: how answers come about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from msgspec import UNSET, UnsetType

from fastserve.core.messages import RequestMetrics


class PromptTokensDetails(msgspec.Struct):
    """How much of the prompts was not computed anew."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens of a whole request, all choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class RankedLogprob(msgspec.Struct):
    """One entry of vLLM's prompt_logprobs."""

    logprob: float
    rank: int
    decoded_token: str | None


class CompletionLogprobs(msgspec.Struct):
    """Lists that run along the tokens; the first token of a prompt has no logprob."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(msgspec.Struct):
    """One likely token of chat logprobs."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct):
    """One token of chat logprobs."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Chat logprobs."""

    content: list[TokenLogprob]
    refusal: None = None


class Extras(msgspec.Struct, kw_only=True):
    """What any choice carries on request."""

    token_ids: list[int] | UnsetType = UNSET
    metrics: RequestMetrics | UnsetType | None = UNSET


class CompletionChoice(Extras, kw_only=True):
    """A completion, or a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_token_ids: Sequence[int] | UnsetType = UNSET
    prompt_logprobs: msgspec.Raw | UnsetType = UNSET


class Said(msgspec.Struct, kw_only=True):
    """What the assistant said."""

    role: str = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Extras, kw_only=True):
    """A chat answer."""

    index: int
    message: Said
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Delta(msgspec.Struct, kw_only=True):
    """A piece of what the assistant says."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Extras, kw_only=True):
    """A piece of a chat answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET


class Answer(msgspec.Struct, kw_only=True):
    """A response, or one chunk of a stream; a chat's prompt extras stand here, not in choices."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[Extras]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET
    prompt_logprobs: msgspec.Raw | UnsetType = UNSET

    def pieces(self) -> list[bytes]:
        """Return its JSON in pieces: to make and to send it as one may hold up other requests."""
        around = msgspec.json.encode(msgspec.structs.replace(self, choices=()))
        head, tail = around.split(b'"choices":[]', 1)  # no string within JSON can spell this
        made = [b"," + msgspec.json.encode(choice) for choice in self.choices]
        made[0] = made[0].removeprefix(b",")
        return [head + b'"choices":[', *made, b"]" + tail]


class ModelCard(msgspec.Struct, kw_only=True):
    """One entry of /v1/models."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "fastserve"
    root: str
    parent: str | None = None
    max_model_len: int | None


class ModelList(msgspec.Struct, kw_only=True):
    """/v1/models."""

    object: str = "list"
    data: list[ModelCard]


class TokenizeResponse(msgspec.Struct, kw_only=True):
    """/tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(msgspec.Struct):
    """/detokenize."""

    prompt: str


class Version(msgspec.Struct):
    """/version."""

    version: str


class Ready(msgspec.Struct):
    """/ready."""

    status: str = "ready"


def sse(payload: msgspec.Struct | Mapping[str, object]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


DONE = b"data: [DONE]\n\n"
