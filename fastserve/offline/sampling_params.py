"""SamplingParams as users write them: vLLM's names and defaults, open to assignment.

Rules: what the engine runs on is the frozen class of the core, made and judged here: at
construction, and again at every use, because fields can be assigned in between. A field of vLLM's
that has no effect here takes the values that ask for nothing and refuses all others by name.
Must not know: the model.
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastserve.core import request

INT64 = range(-(2**63), 2**63)


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn and when to stop.

    Raises ValueError naming the field when a value is out of range or of a wrong type, TypeError
    for a field there is not.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    # Of vLLM; only the values in NO_EFFECT are taken.
    best_of: Any = None
    bad_words: Any = None
    allowed_token_ids: Any = None
    detokenize: Any = True
    spaces_between_special_tokens: Any = True
    truncate_prompt_tokens: Any = None
    output_kind: Any = None
    structured_outputs: Any = None
    guided_decoding: Any = None
    logits_processors: Any = None
    logprob_token_ids: Any = None
    flat_logprobs: Any = False
    extra_args: Any = None
    skip_reading_prefix_cache: Any = None
    thinking_token_budget: Any = None
    repetition_detection: Any = None

    def __post_init__(self) -> None:
        """Refuse bad values at once, where nothing was assigned yet."""
        self.frozen()

    def clone(self) -> SamplingParams:
        """Return a copy that shares nothing with this one."""
        return copy.deepcopy(self)

    def frozen(self) -> request.SamplingParams:
        """Return the parameters as the engine takes them; ValueError naming a bad field."""
        for name, allowed in NO_EFFECT.items():
            value = getattr(self, name)
            if not is_one_of(getattr(value, "value", value), allowed):
                raise ValueError(f"{name} is not supported, got {value!r}.")
        values = {name: read(name, getattr(self, name)) for name, read in READERS.items()}
        if self.best_of not in (None, values["n"]):
            raise ValueError(f"best_of other than n ({self.n}) is not supported.")
        return request.SamplingParams(**values)


# CUMULATIVE and FINAL_ONLY are 0 and 2 in vLLM: what is returned in the end is the same.
NO_EFFECT: Mapping[str, Sequence[Any]] = {
    "bad_words": (None, [], ()),
    "allowed_token_ids": (None,),
    "detokenize": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (None,),
    "output_kind": (None, 0, 2),
    "structured_outputs": (None,),
    "guided_decoding": (None,),
    "logits_processors": (None, [], ()),
    "logprob_token_ids": (None, [], ()),
    "flat_logprobs": (False,),
    "extra_args": (None, {}),
    "skip_reading_prefix_cache": (None, False),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
}


def is_one_of(value: Any, allowed: Sequence[Any]) -> bool:
    """Whether a value is among some; True and 1 are told apart."""
    return any(value is one or (type(value) is type(one) and value == one) for one in allowed)


def integer(name: str, value: Any) -> int:
    """Return a 64-bit integer, numpy's too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}.")
    if int(value) not in INT64:
        raise ValueError(f"{name} must fit in 64 bits, got {value!r}.")
    return int(value)


def number(name: str, value: Any) -> float:
    """Return a float; integers are floats too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r}.")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got {value!r}.") from None


def switch(name: str, value: Any) -> bool:
    """Return a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}.")
    return value


def optional(name: str, value: Any) -> int | None:
    """Return a 64-bit integer, or None."""
    return None if value is None else integer(name, value)


def integers(name: str, value: Any) -> tuple[int, ...]:
    """Return integers; None: none of them."""
    if value is None:
        return ()
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a list of integers, got {value!r}.")
    return tuple([integer(name, entry) for entry in value])


def strings(name: str, value: Any) -> tuple[str, ...]:
    """Return strings, one or several; None: none of them."""
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise ValueError(f"{name} must be a string or a list of strings, got {value!r}.")
    found = tuple(value)
    for entry in found:
        if not isinstance(entry, str):
            raise ValueError(f"{name} must be a string or a list of strings, got {entry!r}.")
    return found


def biases(name: str, value: Any) -> dict[int, float]:
    """Return a bias by id; None: no bias."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must map token ids to numbers, got {value!r}.")
    return {integer(name, token_id): number(name, bias) for token_id, bias in value.items()}


READERS: Mapping[str, Callable[[str, Any], Any]] = {
    "n": integer,
    "temperature": number,
    "top_p": number,
    "top_k": integer,
    "min_p": number,
    "presence_penalty": number,
    "frequency_penalty": number,
    "repetition_penalty": number,
    "seed": optional,
    "logit_bias": biases,
    "logprobs": optional,
    "prompt_logprobs": optional,
    "max_tokens": optional,
    "min_tokens": integer,
    "ignore_eos": switch,
    "stop": strings,
    "stop_token_ids": integers,
    "include_stop_str_in_output": switch,
    "skip_special_tokens": switch,
}
