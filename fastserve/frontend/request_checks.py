"""Judges a request before any work is done for it: the one door of the server and of `LLM`.

Rules: what the engine would run into (its vocabulary, window, KV pool) is a RequestError that names
the parameter, in the same words wherever the request came from. `max_tokens` is a limit: it is cut
to the room that the prompt leaves; only a prompt that leaves none is refused.
Must not know: HTTP, text, torch, how requests run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fastserve.core.request import SamplingParams
from fastserve.wire.engine_messages import EngineInfo

MAX_CHOICES = 2048  # of one request
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_SALT_CHARS = 1024


class RequestError(ValueError):
    """A request that cannot be run; `param` is what is wrong with it, `code` OpenAI's word."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def check_prompt(token_ids: Sequence[int], info: EngineInfo, param: str = "prompt") -> None:
    """Refuse a prompt that is empty or has ids the model does not know."""
    if not token_ids:
        raise RequestError("The prompt is empty; it must have at least one token.", param)
    check_token_ids(token_ids, info.vocab_size, param)


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Refuse ids outside the vocabulary."""
    if token_ids and (max(token_ids) >= vocab_size or min(token_ids) < 0):
        worst = max(token_ids) if max(token_ids) >= vocab_size else min(token_ids)
        raise RequestError(
            f"Token id {worst} in {param} is out of vocabulary (0 to {vocab_size - 1}).", param
        )


def check_num_choices(n: int, num_prompts: int = 1) -> None:
    """Refuse more answers than one request may ask for."""
    if n < 1:
        raise RequestError(f"n must be at least 1, got {n}.", "n")
    if n * num_prompts > MAX_CHOICES:
        raise RequestError(
            f"{num_prompts} prompts × {n} choices are more than the {MAX_CHOICES} choices that "
            "one request may ask for.",
            "n" if num_prompts == 1 else "prompt",
        )


def check_num_logprobs(count: int | None, param: str) -> None:
    """Refuse counts of alternatives out of range."""
    if count is not None and not 0 <= count <= MAX_LOGPROBS:
        raise RequestError(f"{param} must be in [0, {MAX_LOGPROBS}], got {count}.", param)


def check_stop_strings(stop_strings: Sequence[str], *, has_tokenizer: bool = True) -> None:
    """Refuse stop strings where there is no text, and such that would cost every token too much."""
    if len(stop_strings) > MAX_STOP_STRINGS:
        raise RequestError(f"stop must have at most {MAX_STOP_STRINGS} strings.", "stop")
    if any(len(stop) > MAX_STOP_CHARS for stop in stop_strings):
        raise RequestError(f"stop strings must have at most {MAX_STOP_CHARS} characters.", "stop")
    if stop_strings and not has_tokenizer:
        raise RequestError("stop strings need a tokenizer, and this model has none.", "stop")


def check_cache_salt(salt: str | None) -> None:
    """Refuse a salt that keeps nothing apart, and one that every choice would carry at a cost."""
    if salt is not None and not 1 <= len(salt) <= MAX_SALT_CHARS:
        raise RequestError(
            f"cache_salt must be a string of 1 to {MAX_SALT_CHARS} characters.", "cache_salt"
        )


def check_params(params: SamplingParams, info: EngineInfo, *, has_tokenizer: bool) -> None:
    """Refuse what this engine cannot do of the parameters, whatever the prompt is."""
    check_num_choices(params.n)
    check_num_logprobs(params.logprobs, "logprobs")
    check_num_logprobs(params.prompt_logprobs, "prompt_logprobs")
    check_stop_strings(params.stop_strings, has_tokenizer=has_tokenizer)
    check_token_ids(params.stop_token_ids, info.vocab_size, "stop_token_ids")
    check_token_ids(list(params.logit_bias), info.vocab_size, "logit_bias")
    if params.min_tokens and len(params.ending_ids(info.eos_token_ids)) >= info.vocab_size:
        raise RequestError(
            "min_tokens leaves no token: every one of them would stop.", "min_tokens"
        )


def fitted(
    params: SamplingParams,
    num_prompt_tokens: int,
    info: EngineInfo,
    *,
    param: str = "max_tokens",
    part: str = "prompt",
    is_scored_alone: bool = False,
) -> SamplingParams:
    """Return parameters whose `max_tokens` fits behind a prompt; None becomes all the room.

    `param` and `part` are what the client calls the limit and the prompt. Where a prompt is only
    scored, it may fill the window: the KV of the one token behind it is never needed.
    """
    for limit, holder in (
        (info.max_model_len, "This model's maximum context length is"),
        (info.max_request_tokens, "The KV cache holds, of one request, at most"),
    ):
        if num_prompt_tokens >= limit + is_scored_alone:
            asked = params.max_tokens or 1
            raise RequestError(
                f"{holder} {limit} tokens. However, you requested {num_prompt_tokens + asked} "
                f"tokens ({num_prompt_tokens} in the {part}, {asked} in the completion). "
                f"Please reduce the length of the {part}.",
                part,
                "context_length_exceeded",
            )
    room = info.max_request_tokens + is_scored_alone - num_prompt_tokens
    if params.min_tokens > room:
        raise RequestError(
            f"min_tokens is {params.min_tokens}, and the {part} of {num_prompt_tokens} tokens "
            f"leaves room for {room}.",
            "min_tokens",
            "context_length_exceeded",
        )
    max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    return dataclasses.replace(params, max_tokens=max_tokens)
