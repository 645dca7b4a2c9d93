"""SamplingParams as users write them: open to assignment, judged at every use."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
import pytest

from fastserve import SamplingParams
from fastserve.core import request


class OutputKind(Enum):
    """As vLLM's RequestOutputKind."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


def test_no_arguments_are_the_core_s_defaults() -> None:
    """Nothing differs between the two classes but who may assign."""
    assert SamplingParams().frozen() == request.SamplingParams(stop=(), logit_bias={})


def test_vllm_s_own_defaults_are_taken() -> None:
    """None is none, and fields without effect take what vLLM fills them with."""
    params = SamplingParams(
        stop=None, stop_token_ids=None, logit_bias=None, seed=None, logprobs=None, best_of=None,
        bad_words=[], allowed_token_ids=None, detokenize=True, truncate_prompt_tokens=None,
        output_kind=OutputKind.FINAL_ONLY, structured_outputs=None, guided_decoding=None,
        extra_args={}, spaces_between_special_tokens=True, logits_processors=None,
        flat_logprobs=False, skip_reading_prefix_cache=None, thinking_token_budget=None,
    )  # fmt: skip
    assert params.frozen() == SamplingParams().frozen()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 2),
        ("bad_words", ["x"]),
        ("allowed_token_ids", [1]),
        ("detokenize", False),
        ("spaces_between_special_tokens", False),
        ("truncate_prompt_tokens", 5),
        ("output_kind", OutputKind.DELTA),
        ("output_kind", 1),
        ("structured_outputs", {"json": {}}),
        ("guided_decoding", {"json": {}}),
        ("logits_processors", [print]),
        ("logprob_token_ids", [5]),
        ("flat_logprobs", True),
        ("extra_args", {"a": 1}),
        ("skip_reading_prefix_cache", True),
        ("thinking_token_budget", 5),
        ("repetition_detection", {"a": 1}),
        ("n", 0),
        ("n", 1.0),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", None),
        ("temperature", float("nan")),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_k", 1.5),
        ("top_k", 2**63),
        ("seed", 2**63),
        ("seed", "x"),
        ("logprobs", True),
        ("logprobs", -1),
        ("max_tokens", 0),
        ("max_tokens", "many"),
        ("max_tokens", 1.5),
        ("min_tokens", 17),
        ("ignore_eos", "yes"),
        ("stop", 5),
        ("stop", ["a", 5]),
        ("stop", {"a": 1}),
        ("stop", [""]),
        ("stop_token_ids", 5),
        ("stop_token_ids", "56"),
        ("stop_token_ids", [1.5]),
        ("logit_bias", [5]),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: "x"}),
        ("logit_bias", {5: 101}),
    ],
)
def test_bad_values_are_refused_by_name(name: str, value: Any) -> None:
    """At construction, and at use where they were assigned."""
    with pytest.raises(ValueError, match=rf"^{name} "):
        SamplingParams(**{name: value})
    params = SamplingParams()
    setattr(params, name, value)
    with pytest.raises(ValueError, match=rf"^{name} "):
        params.frozen()


def test_a_field_there_is_not_is_refused() -> None:
    """Given or assigned: a misspelling is not dropped."""
    with pytest.raises(TypeError, match="tempreture"):
        SamplingParams(tempreture=0.5)  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match="tempreture"):
        SamplingParams().tempreture = 0.5  # type: ignore[attr-defined]


def test_numbers_of_numpy_are_numbers() -> None:
    """They become the plain ones that the wire carries."""
    given: dict[str, Any] = {
        "temperature": np.float32(0.5),
        "max_tokens": np.int64(9),
        "stop_token_ids": np.array([7, 8]),
        "logit_bias": {np.int32(5): np.float64(1.5)},
    }
    frozen = SamplingParams(**given).frozen()
    values = (frozen.temperature, frozen.max_tokens, *frozen.stop_token_ids, *frozen.logit_bias)
    assert values == (0.5, 9, 7, 8, 5)
    assert {type(value) for value in values} == {int, float}


def test_what_is_frozen_is_not_changed_by_later_assignments() -> None:
    """A request that runs keeps what it was given; so does a clone."""
    params = SamplingParams(stop=["a"], logit_bias={5: 1.0})
    frozen, clone = params.frozen(), params.clone()
    params.stop.append("b")  # type: ignore[union-attr]
    params.logit_bias[6] = 1.0  # type: ignore[index]
    params.temperature = 0.0
    assert (frozen.stop, frozen.logit_bias, frozen.temperature) == (("a",), {5: 1.0}, 1.0)
    assert clone == SamplingParams(stop=["a"], logit_bias={5: 1.0})
