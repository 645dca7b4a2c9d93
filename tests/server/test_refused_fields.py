"""Fields of other servers: refused by name, let pass, or logged once."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from fastserve.server.errors import ApiError
from fastserve.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    TokenizeRequest,
)
from fastserve.server.refused_fields import (
    HARMLESS,
    INSTEAD,
    MAX_LOGGED_NAMES,
    REFUSED,
    UnreadFields,
)
from tests.server.scripted import ScriptedEngine, call, make_app, post
from tests.server.test_errors import error_of

MESSAGES = [{"role": "user", "content": "x"}]
ROUTES: dict[type, tuple[str, dict[str, Any]]] = {
    CompletionRequest: ("/v1/completions", {"prompt": "x"}),
    ChatCompletionRequest: ("/v1/chat/completions", {"messages": MESSAGES}),
    TokenizeRequest: ("/tokenize", {"messages": MESSAGES}),
}
# A value that asks for something, where [{"a": 1}] would not show it.
ASKING: dict[str, Any] = {
    "web_search_options": {}, "do_sample": False, "include_reasoning": False, "top_n_sigma": 1,
    "reasoning_effort": "none", "enable_thinking": False, "json_schema": {}, "max_new_tokens": 0,
    "tool_choice": "required", "typical_p": 0.9, "mirostat": 2, "verbosity": "low",
    "use_beam_search": True, "response_format": {"type": "json_object"}, "best_of": 2,
    "modalities": ["text", "audio"], "logprob_token_ids": [5], "n_predict": -1, "prompt": "x",
    "suffix": "x", "regex": "a+", "min_keep": 1, "temperature_last": True,
    "truncate_prompt_tokens": -1,
}  # fmt: skip
TABLE = [(kind, name) for kind, refused in REFUSED.items() for name in refused]
PASSING = [
    (kind, name, value)
    for kind, refused in REFUSED.items()
    for name, values in refused.items()
    for value in (None, *values)
]
# The request fields of other servers' two routes, each of which must have been decided.
VLLM = (
    "model", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "max_tokens",
    "max_completion_tokens", "n", "presence_penalty", "response_format", "seed", "stop",
    "stream", "stream_options", "temperature", "top_p", "tools", "tool_choice",
    "reasoning_effort", "include_reasoning", "parallel_tool_calls", "user", "use_beam_search",
    "top_k", "min_p", "repetition_penalty", "length_penalty", "stop_token_ids",
    "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens",
    "spaces_between_special_tokens", "truncate_prompt_tokens", "truncation_side",
    "prompt_logprobs", "allowed_token_ids", "bad_words", "echo", "add_generation_prompt",
    "continue_final_message", "add_special_tokens", "documents", "chat_template",
    "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs", "structured_outputs",
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structural_tag",
    "guided_decoding_backend", "guided_whitespace_pattern", "priority", "request_id",
    "return_tokens_as_token_ids", "return_token_ids", "cache_salt", "kv_transfer_params",
    "vllm_xargs", "thinking_token_budget", "logits_processors", "repetition_detection",
    "prompt_embeds", "suffix", "best_of",
)  # fmt: skip
SGLANG = (
    "json_schema", "regex", "ebnf", "stop_regex", "no_stop_trim", "lora_path", "session_params",
    "custom_params", "custom_logit_processor", "bootstrap_host", "bootstrap_port",
    "bootstrap_room", "routed_dp_rank", "disagg_prefill_dp_rank", "data_parallel_rank", "rid",
    "extra_key", "cache_salt", "custom_labels", "return_hidden_states", "return_routed_experts",
    "return_cached_tokens_details", "separate_reasoning", "stream_reasoning", "min_tokens",
    "log_metrics", "no_logs",
)  # fmt: skip
LLAMA_CPP = (
    "dynatemp_range", "dynatemp_exponent", "top_k", "top_p", "min_p", "n_predict", "n_indent",
    "n_keep", "n_discard", "t_max_predict_ms", "typical_p", "top_n_sigma", "xtc_probability",
    "xtc_threshold", "repeat_penalty", "repeat_last_n", "dry_multiplier", "dry_base",
    "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers", "mirostat",
    "mirostat_tau", "mirostat_eta", "grammar", "grammar_lazy", "grammar_triggers",
    "preserved_tokens", "json_schema", "ignore_eos", "logit_bias", "n_probs", "min_keep",
    "image_data", "id_slot", "cache_prompt", "return_tokens", "samplers", "timings_per_token",
    "return_progress", "post_sampling_probs", "response_fields", "lora", "reasoning_format",
    "reasoning_in_content", "reasoning_budget", "thinking_budget_tokens",
    "thinking_forced_open", "parse_tool_calls", "n_cmpl", "adaptive_target", "adaptive_decay",
    "backend_sampling", "speculative.n_max", "speculative.n_min", "speculative.p_min",
)  # fmt: skip


def is_decided(kind: type, name: str) -> bool:
    """Whether a field is read, let pass, or refused on a route."""
    return name in kind.model_fields or name in HARMLESS or name in REFUSED[kind]  # type: ignore[attr-defined]


def checked(kind: type, name: str, value: Any) -> ApiError | None:
    """Return what is said to a request with that field; None when it passes."""
    body = kind.model_validate({**ROUTES[kind][1], name: value})  # type: ignore[attr-defined]
    try:
        UnreadFields().check(body)
    except ApiError as error:
        return error
    return None


@pytest.mark.parametrize(("kind", "name"), TABLE)
def test_a_field_that_would_change_the_answer_is_refused_by_name(kind, name):
    """On each route that does not read it."""
    error = checked(kind, name, ASKING.get(name, [{"a": 1}]))
    assert error is not None
    assert (error.status_code, error.param) == (400, name)
    assert error.message.startswith(f"{name} is not supported by this server")


@pytest.mark.parametrize(("kind", "name", "value"), PASSING)
def test_a_refused_field_may_ask_for_nothing(kind, name, value):
    """Null and the value that means what happens anyway: clients send their defaults."""
    assert checked(kind, name, value) is None


@pytest.mark.parametrize(
    ("offered", "chooses"), [("tools", "tool_choice"), ("functions", "function_call")]
)
@pytest.mark.parametrize(("choice", "passes"), [("none", True), ("auto", False), (None, False)])
def test_tools_may_be_offered_where_none_is_to_be_used(offered, chooses, choice, passes):
    """In either order of the two fields."""
    fields = {offered: [{"type": "function"}], chooses: choice}
    for names in ((offered, chooses), (chooses, offered)):
        given = {name: fields[name] for name in names}
        body = ChatCompletionRequest.model_validate({"messages": MESSAGES, **given})
        if passes:
            UnreadFields().check(body)
        else:
            with pytest.raises(ApiError, match=offered):
                UnreadFields().check(body)


@pytest.mark.parametrize("kind", ROUTES)
def test_each_route_judges_its_fields(kind):
    """Before anything reaches the engine; what asks for nothing is answered."""
    path, body = ROUTES[kind]
    engine = ScriptedEngine()
    error = error_of(post(engine, path, {**body, "tools": [{"type": "function"}]}), 400)
    assert error["param"] == "tools"
    assert not engine.streams
    assert post(engine, path, {**body, "tools": []}).status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_beam_search", 0), ("num_beams", True), ("echo", 0), ("n_probs", False)],
)
def test_true_is_not_one_and_false_is_not_zero(name, value):
    """A field of another type than it should have asks for something unclear."""
    assert checked(ChatCompletionRequest, name, value) is not None


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_a_harmless_field_passes_without_a_word(name, caplog):
    """On both routes, whatever it holds."""
    for kind in (CompletionRequest, ChatCompletionRequest):
        if name not in kind.model_fields:
            assert checked(kind, name, {"a": 1}) is None
    assert not caplog.records


@pytest.mark.parametrize("name", VLLM + SGLANG + LLAMA_CPP)
def test_every_field_of_other_servers_is_decided(name):
    """Read, let pass, or refused; none of them is unknown."""
    for kind in (CompletionRequest, ChatCompletionRequest):
        assert is_decided(kind, name)


def test_every_field_of_openai_is_decided():
    """As its own client declares them; a new one fails here until it is decided."""
    for kind, params in (
        (ChatCompletionRequest, chat_params.CompletionCreateParamsBase),
        (CompletionRequest, completion_params.CompletionCreateParamsBase),
    ):
        assert [name for name in params.__annotations__ if not is_decided(kind, name)] == []


def test_the_tables_do_not_contradict_each_other():
    """No field that is read is refused, and none is both refused and harmless."""
    for kind, refused in REFUSED.items():
        assert not refused.keys() & kind.model_fields.keys()
        assert not refused.keys() & HARMLESS
    assert set(INSTEAD) <= {name for refused in REFUSED.values() for name in refused}


def test_a_refusal_names_the_field_that_does_it():
    """Only where this route has it."""
    for kind, name, hint in (
        (CompletionRequest, "enable_thinking", ""),
        (ChatCompletionRequest, "enable_thinking", "; use chat_template_kwargs"),
        (CompletionRequest, "n_predict", "; use max_tokens"),
    ):
        error = checked(kind, name, 5)
        assert error is not None
        assert error.message == f"{name} is not supported by this server{hint}."


def test_an_unknown_field_is_logged_once(caplog):
    """By its name, without its value; in stream_options too."""
    app = make_app(ScriptedEngine())
    path, body = ROUTES[CompletionRequest]
    body = {**body, "max_tokns": "secret", "stream": True, "stream_options": {"odd": "secret"}}
    with caplog.at_level(logging.WARNING, logger="fastserve.server.refused_fields"):
        for _ in range(3):
            assert call(app, "POST", path, json=body).status_code == 200
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "'max_tokns'" in lines[0]
    assert "'stream_options.odd'" in lines[1]
    assert "secret" not in "".join(lines)


def test_names_that_clients_make_up_fill_neither_log_nor_memory(caplog):
    """A bound on how many are logged, and on how long each is; control characters are escaped."""
    unread = UnreadFields()
    names = ["x" * 10_000, "a\nb", *(f"f{i}" for i in range(2 * MAX_LOGGED_NAMES))]
    body = CompletionRequest.model_validate({"prompt": "x", **dict.fromkeys(names, 1)})
    with caplog.at_level(logging.WARNING, logger="fastserve.server.refused_fields"):
        unread.check(body)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == MAX_LOGGED_NAMES
    assert max(map(len, lines)) < 200
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize(
    ("given", "num_logprobs"), [(False, None), (True, 1), (0, 0), (None, None)]
)
def test_completion_logprobs_false_is_off(given, num_logprobs):
    """And true is 1, as in vLLM."""
    engine = ScriptedEngine()
    answer = post(engine, "/v1/completions", {"prompt": "x", "logprobs": given}).json()
    assert (answer["choices"][0]["logprobs"] is None) is (num_logprobs is None)
    assert engine.streams[0].params.logprobs == num_logprobs
