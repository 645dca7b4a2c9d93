"""Judges the fields of a request's body, and makes its sampling parameters.

Rules: what cannot be honoured is refused with a 400 that names the field; the fields that are not
read at all are judged in refused_fields.py, when the body is. What any engine request must keep to
(vocabulary, window, KV pool) is judged in request_checks.py, for `LLM` too; here its words become
the client's. Must not know: how answers are shaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fastserve.core.request import SamplingParams
from fastserve.frontend.request_checks import (
    RequestError,
    check_cache_salt,
    check_num_choices,
    check_num_logprobs,
    check_params,
    check_prompt,
    check_stop_strings,
    fitted,
)
from fastserve.server.errors import invalid
from fastserve.server.prompts import Prompt
from fastserve.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from fastserve.wire.engine_messages import EngineInfo

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's

SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "logit_bias", "min_tokens", "ignore_eos", "stop",
    "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens",
)  # fmt: skip


@contextmanager
def refused_with_400() -> Iterator[None]:
    """Tell the client what a RequestError says."""
    try:
        yield
    except RequestError as error:
        raise invalid(str(error), error.param, error.code) from error


def check_fields(body: GenerationRequest, num_prompts: int) -> None:
    """Refuse what the request's own fields show to be impossible."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options is only allowed when stream is true.", "stream_options")
    n = 1 if body.n is None else body.n
    if isinstance(body, CompletionRequest) and body.best_of not in (None, n):
        raise invalid(f"best_of other than n ({n}) is not supported.", "best_of")
    with refused_with_400():
        check_num_choices(n, num_prompts)
        check_logprobs(body)
        check_stop_strings([body.stop] if isinstance(body.stop, str) else body.stop or [])
        check_cache_salt(body.cache_salt)


def check_logprobs(body: GenerationRequest) -> None:
    """Refuse counts of alternatives out of range."""
    check_num_logprobs(body.prompt_logprobs, "prompt_logprobs")
    if isinstance(body, CompletionRequest):
        check_num_logprobs(body.logprobs, "logprobs")
    elif isinstance(body, ChatCompletionRequest):
        check_num_logprobs(body.top_logprobs, "top_logprobs")
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs needs logprobs to be true.", "top_logprobs")


def cache_salt(body: GenerationRequest, tenant: str) -> str:
    """Return what a request shares KV by: its own salt, within those who show the same key."""
    own = body.cache_salt or ""
    return f"{tenant}:{own}" if tenant else own


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
    body: GenerationRequest, prompts: Sequence[Prompt], info: EngineInfo, *, has_tokenizer: bool
) -> list[SamplingParams]:
    """Return the parameters of each prompt's first choice."""
    is_chat = isinstance(body, ChatCompletionRequest)
    part = "messages" if is_chat else "prompt"
    asked, param = asked_tokens(body, info)
    params = common_params(body, info, asked, param)
    with refused_with_400():
        check_params(params, info, has_tokenizer=has_tokenizer)
        for prompt in prompts:
            check_prompt(prompt.token_ids, info, part)
        return [
            fitted(
                params,
                len(prompt.token_ids),
                info,
                part=part,
                is_scored_alone=is_echo_alone(body),
            )
            for prompt in prompts
        ]


def common_params(
    body: GenerationRequest, info: EngineInfo, max_tokens: int | None, param: str
) -> SamplingParams:
    """Return what holds for every prompt: the body's values, the model's where it has none."""
    if max_tokens is not None and max_tokens < 1:
        raise invalid(f"{param} must be at least 1, got {max_tokens}.", param)
    defaults = info.sampling_defaults
    values = {name: defaults[name] for name in SAMPLING_FIELDS if name in defaults}
    given = {name: getattr(body, name) for name in SAMPLING_FIELDS}
    values.update({name: value for name, value in given.items() if value is not None})
    prompt_logprobs = body.prompt_logprobs
    if isinstance(body, CompletionRequest) and body.echo and body.logprobs is not None:
        prompt_logprobs = max(body.logprobs, prompt_logprobs or 0)
    try:
        return SamplingParams(
            **values,
            n=1,
            logprobs=num_logprobs(body),
            prompt_logprobs=prompt_logprobs,
            max_tokens=max_tokens,
        )
    except ValueError as error:
        raise invalid(str(error), str(error).partition(" ")[0]) from error


def asked_tokens(body: GenerationRequest, info: EngineInfo) -> tuple[int | None, str]:
    """Return the most tokens to generate (None: all there is room for), and the field it is in."""
    if is_echo_alone(body):
        return 1, "max_tokens"
    if isinstance(body, ChatCompletionRequest) and body.max_completion_tokens is not None:
        return body.max_completion_tokens, "max_completion_tokens"
    if body.max_tokens is not None:
        return body.max_tokens, "max_tokens"
    default: int | None = info.sampling_defaults.get("max_tokens")
    is_chat = isinstance(body, ChatCompletionRequest)
    if not is_chat and "max_tokens" not in body.model_fields_set and default is None:
        default = DEFAULT_COMPLETION_TOKENS
    return default, "max_tokens"
