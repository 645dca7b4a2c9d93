"""Judges the fields of a request's body, and makes its sampling parameters.

Rules: what cannot be honoured is refused with a 400 that names the field; the fields that are not
read at all are judged in refused_fields.py, when the body is. What any engine request must keep to
(vocabulary, window, KV pool) is judged in request_checks.py, for `LLM` too; here its words become
the client's. The price (price.py) is judged twice: by the fields alone, before any prompt is read,
and by the prompts, before anything is made for a choice. Must not know: how answers are shaped.
"""

from __future__ import annotations

import dataclasses
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
from fastserve.server.price import Demand
from fastserve.server.prompts import Prompt, num_chars
from fastserve.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from fastserve.wire.engine_messages import EngineInfo

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
MAX_ENTRIES = {"stop_token_ids": 256, "logit_bias": 1024}
MAX_USER_CHARS = 1024
MAX_METADATA_PAIRS = 16  # OpenAI's, and so is the next
MAX_METADATA_CHARS = 512  # of one value

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


def check_fields(
    body: GenerationRequest, num_prompts: int, num_known_tokens: int, info: EngineInfo, price: int
) -> None:
    """Refuse what the request's own fields show to be impossible, or to cost more than `price`.

    `num_known_tokens` is what all prompts have together at least, in tokens.
    """
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
    check_sizes(body)
    asked, _ = asked_tokens(body, info)
    room = info.max_request_tokens - num_known_tokens  # at least so much, of each prompt
    least = 1 if asked is None else max(1, min(asked, room))
    check_price(demand_of(body, num_prompts, num_known_tokens, least), price)


def check_sizes(body: GenerationRequest) -> None:
    """Refuse what every choice would carry along, or hold every token against, at a cost."""
    for name, limit in MAX_ENTRIES.items():
        if len(getattr(body, name) or ()) > limit:
            raise invalid(f"{name} must have at most {limit} entries.", name)
    if body.user is not None and len(body.user) > MAX_USER_CHARS:
        raise invalid(f"user must have at most {MAX_USER_CHARS} characters.", "user")
    metadata = (body.model_extra or {}).get("metadata")
    if not isinstance(metadata, dict):
        return
    if len(metadata) > MAX_METADATA_PAIRS:
        raise invalid(f"metadata must have at most {MAX_METADATA_PAIRS} pairs.", "metadata")
    if any(len(key) + num_chars(value) > MAX_METADATA_CHARS for key, value in metadata.items()):
        raise invalid(
            f"a pair of metadata must have at most {MAX_METADATA_CHARS} characters.", "metadata"
        )


def demand_of(
    body: GenerationRequest, num_prompts: int, prompt_tokens: int, max_tokens: int
) -> Demand:
    """Return what a request asks for; of choices, as many as it says, at least one."""
    return Demand(
        num_prompts=num_prompts,
        n=body.n or 1,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        logprobs=num_logprobs(body) or 0,
        prompt_logprobs=num_prompt_logprobs(body) or 0,
    )


def check_price(demand: Demand, price: int) -> None:
    """Raise 400 for a request that asks for more than one may."""
    if demand.price > price:
        raise invalid(
            f"This request asks for {demand} tokens and scores; one request may ask for at most "
            f"{price}.",
            demand.lever,
            "request_too_expensive",
        )


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
    body: GenerationRequest,
    prompts: Sequence[Prompt],
    info: EngineInfo,
    *,
    has_tokenizer: bool,
    price: int,
) -> list[SamplingParams]:
    """Return the parameters of each prompt's first choice; all of them cost at most `price`.

    A limit that the request did not set is cut to what that leaves.
    """
    is_chat = isinstance(body, ChatCompletionRequest)
    part = "messages" if is_chat else "prompt"
    asked, param = asked_tokens(body, info)
    num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    demand = demand_of(body, len(prompts), num_prompt_tokens, 1)
    check_price(demand, price)
    if not sets_limit(body):
        affordable = demand.affordable_tokens(price)
        asked = affordable if asked is None else min(asked, affordable)
    params = common_params(body, info, asked, param)
    with refused_with_400():
        check_params(params, info, has_tokenizer=has_tokenizer)
        for prompt in prompts:
            check_prompt(prompt.token_ids, info, part)
        each = [
            fitted(
                params,
                len(prompt.token_ids),
                info,
                part=part,
                is_scored_alone=is_echo_alone(body),
            )
            for prompt in prompts
        ]
    longest = max(params.max_tokens or 1 for params in each)
    check_price(dataclasses.replace(demand, max_tokens=longest), price)
    return each


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
    try:
        return SamplingParams(
            **values,
            n=1,
            logprobs=num_logprobs(body),
            prompt_logprobs=num_prompt_logprobs(body),
            max_tokens=max_tokens,
        )
    except ValueError as error:
        raise invalid(str(error), str(error).partition(" ")[0]) from error


def num_prompt_logprobs(body: GenerationRequest) -> int | None:
    """Return how many alternatives each prompt token needs; None for no scores at all."""
    if isinstance(body, CompletionRequest) and body.echo and body.logprobs is not None:
        return max(body.logprobs, body.prompt_logprobs or 0)
    return body.prompt_logprobs


def sets_limit(body: GenerationRequest) -> bool:
    """Whether the request says itself how long an answer may be."""
    if isinstance(body, ChatCompletionRequest) and body.max_completion_tokens is not None:
        return True
    return body.max_tokens is not None


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
