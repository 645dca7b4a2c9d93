"""Judges a request before any work is done for it, and makes its sampling parameters.

Rules: what cannot be honoured is refused with a 400 that names the field; the fields that are not
read at all are judged in refused_fields.py, when the body is. Every limit the engine would run into
(vocabulary, window, KV pool) is checked here. Must not know: how answers are shaped.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastserve.core.request import SamplingParams
from fastserve.engine.messages import EngineInfo
from fastserve.server.errors import invalid
from fastserve.server.prompts import Prompt, check_token_ids
from fastserve.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)

MAX_CHOICES = 2048  # of one HTTP request
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's

SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "logit_bias", "min_tokens", "ignore_eos", "stop",
    "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens",
)  # fmt: skip


def check_fields(body: GenerationRequest, num_prompts: int) -> None:
    """Refuse what the request's own fields show to be impossible."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options is only allowed when stream is true.", "stream_options")
    n = 1 if body.n is None else body.n
    if isinstance(body, CompletionRequest) and body.best_of not in (None, n):
        raise invalid(f"best_of other than n ({n}) is not supported.", "best_of")
    if n < 1:
        raise invalid(f"n must be at least 1, got {n}.", "n")
    if n * num_prompts > MAX_CHOICES:
        raise invalid(
            f"{num_prompts} prompts × {n} choices are more than the {MAX_CHOICES} choices that "
            "one request may ask for.",
            "n" if num_prompts == 1 else "prompt",
        )
    check_logprobs(body)
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > MAX_STOP_STRINGS:
        raise invalid(f"stop must have at most {MAX_STOP_STRINGS} strings.", "stop")
    if any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise invalid(f"stop strings must have at most {MAX_STOP_CHARS} characters.", "stop")


def check_logprobs(body: GenerationRequest) -> None:
    """Refuse counts of alternatives out of range."""
    counts = {"prompt_logprobs": body.prompt_logprobs}
    if isinstance(body, CompletionRequest):
        counts["logprobs"] = body.logprobs
    elif isinstance(body, ChatCompletionRequest):
        counts["top_logprobs"] = body.top_logprobs
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs needs logprobs to be true.", "top_logprobs")
    for name, count in counts.items():
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise invalid(f"{name} must be in [0, {MAX_LOGPROBS}], got {count}.", name)


def is_echo_alone(body: GenerationRequest) -> bool:
    """Whether only the prompt is wanted: scored, and nothing generated."""
    return isinstance(body, CompletionRequest) and bool(body.echo) and body.max_tokens == 0


def num_logprobs(body: GenerationRequest) -> int | None:
    """Return how many alternatives each output token needs; None for no logprobs at all."""
    if isinstance(body, CompletionRequest):
        return body.logprobs
    if isinstance(body, ChatCompletionRequest) and body.logprobs:
        return body.top_logprobs or 0
    return None


def sampling_params(
    body: GenerationRequest, prompts: Sequence[Prompt], info: EngineInfo
) -> list[SamplingParams]:
    """Return the parameters of each prompt's first choice."""
    defaults = info.sampling_defaults
    values = {
        name: defaults[name]
        for name in SAMPLING_FIELDS
        if getattr(body, name) is None and name in defaults
    }
    given = {name: getattr(body, name) for name in SAMPLING_FIELDS}
    values.update({name: value for name, value in given.items() if value is not None})
    prompt_logprobs = body.prompt_logprobs
    if isinstance(body, CompletionRequest) and body.echo and body.logprobs is not None:
        prompt_logprobs = max(body.logprobs, prompt_logprobs or 0)
    check_token_ids(values.get("stop_token_ids", ()), info.vocab_size, "stop_token_ids")
    check_token_ids(list(values.get("logit_bias", ())), info.vocab_size, "logit_bias")
    ending_ids = info.eos_token_ids.union(values.get("stop_token_ids", ()))
    if values.get("min_tokens") and len(ending_ids) >= info.vocab_size:
        raise invalid("min_tokens leaves no token: every one of them would stop.", "min_tokens")
    all_params = []
    for prompt in prompts:
        max_tokens = output_limit(body, len(prompt.token_ids), info)
        try:
            params = SamplingParams(
                **values,
                n=1,
                logprobs=num_logprobs(body),
                prompt_logprobs=prompt_logprobs,
                max_tokens=max_tokens,
            )
        except ValueError as error:
            raise invalid(str(error), str(error).partition(" ")[0]) from error
        all_params.append(params)
    return all_params


def output_limit(body: GenerationRequest, num_prompt_tokens: int, info: EngineInfo) -> int:
    """Return the most tokens to generate; 400 when there is no room for what was asked."""
    is_chat = isinstance(body, ChatCompletionRequest)
    part = "messages" if is_chat else "prompt"
    asked = body.max_tokens
    param = "max_tokens"
    if isinstance(body, ChatCompletionRequest) and body.max_completion_tokens is not None:
        asked, param = body.max_completion_tokens, "max_completion_tokens"
    if is_echo_alone(body):
        asked = 1
    if asked is not None and asked < 1:
        raise invalid(f"{param} must be at least 1, got {asked}.", param)
    for limit, holder in (
        (info.max_model_len, "This model's maximum context length is"),
        (info.max_request_tokens, "This server's KV cache holds, of one request, at most"),
    ):
        if num_prompt_tokens + (asked or 1) > limit:
            total = num_prompt_tokens + (asked or 1)
            raise invalid(
                f"{holder} {limit} tokens. However, you requested {total} tokens "
                f"({num_prompt_tokens} in the {part}, {asked or 1} in the completion). "
                f"Please reduce the length of the {part} or completion.",
                part if num_prompt_tokens >= limit else param,
                "context_length_exceeded",
            )
    room = min(info.max_model_len, info.max_request_tokens) - num_prompt_tokens
    if asked is not None:
        return asked
    default = info.sampling_defaults.get("max_tokens")
    if not is_chat and "max_tokens" not in body.model_fields_set and default is None:
        default = DEFAULT_COMPLETION_TOKENS
    return room if default is None else min(room, int(default))
