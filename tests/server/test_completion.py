"""/v1/completions over a scripted engine: shapes that OpenAI's and vLLM's clients read."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fastserve.core.messages import NOT_FINITE, RequestUpdate, Sample
from fastserve.core.request import FinishReason, Handle
from fastserve.text.tokenizer import Tokenizer
from tests import tiny_tokenizers
from tests.server.scripted import (
    EOS,
    METRICS,
    TOKENIZER,
    ScriptedEngine,
    call,
    entry,
    fails,
    make_app,
    post,
    says,
    scored,
)

PATH = "/v1/completions"


def sse_events(response) -> list:
    """Return the payloads of a stream; its end must be as OpenAI's."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_the_whole_answer():
    """Every field OpenAI documents, and vLLM's stop_reason."""
    answer = post(ScriptedEngine(says("fox")), PATH, {"prompt": "The"}).json()
    num_prompt = len(TOKENIZER.encode("The"))
    num_output = len(TOKENIZER.encode("fox", add_special_tokens=False)) + 1
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1.7e9
    assert answer == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0, "text": "fox", "logprobs": None, "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt, "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }  # fmt: skip


def test_choices_are_counted_once_a_prompt():
    """As they were asked for."""
    engine = ScriptedEngine()
    assert post(engine, PATH, {"prompt": ["a", "b"], "n": 3}).status_code == 200
    exposition = engine.metrics.render()[0].decode()
    labels = '{engine="0",model_name="tiny"}'
    assert f"vllm:request_params_n_sum{labels} 6.0" in exposition
    assert f"vllm:request_params_n_count{labels} 2.0" in exposition


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("dog", [TOKENIZER.encode("dog")]),
        (["dog", "x"], [TOKENIZER.encode("dog"), TOKENIZER.encode("x")]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_the_four_kinds_of_prompt(prompt, expected):
    """A text, texts, ids, lists of ids; n choices of each, in order."""
    engine = ScriptedEngine()
    answer = post(engine, PATH, {"prompt": prompt, "n": 2}).json()
    sent = [stream.prompt_token_ids for stream in engine.streams]
    assert sent == [ids for ids in expected for _ in range(2)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(expected)


def test_what_was_cached_of_a_prompt_is_what_its_first_choice_found():
    """Whichever ends first; the others find what that one computed, and a prompt is all there is.

    A choice that went on in another engine may have found its own output too.
    """
    found = iter((2, 5, 99, 7))

    def script(stream):
        (update,) = says("ok", per_update=9)(stream)
        assert isinstance(update, RequestUpdate)
        return [update._replace(metrics=dataclasses.replace(METRICS, cached_tokens=next(found)))]

    answer = post(ScriptedEngine(script), PATH, {"prompt": ["abc", "xyz"], "n": 2}).json()
    num_last = len(TOKENIZER.encode("xyz"))
    assert num_last < 99
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2 + num_last}


def test_parameters_reach_the_engine():
    """By vLLM's names; seed + i for choice i; the engine's defaults where nothing is said."""
    engine = ScriptedEngine(sampling_defaults={"temperature": 0.5, "top_p": 0.25})
    body = {
        "prompt": "x", "n": 2, "seed": 9, "temperature": 0.75, "top_k": 3, "min_p": 0.125,
        "repetition_penalty": 1.5, "ignore_eos": True, "min_tokens": 2, "stop_token_ids": [7],
        "logit_bias": {"5": -1.5}, "priority": -3, "user": "ada", "presence_penalty": None,
        "cache_salt": "pepper",
    }  # fmt: skip
    assert post(engine, PATH, body, enable_priority=True).status_code == 200
    first, second = engine.streams
    params = first.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.75, 0.25, 3, 0.125)
    assert (params.repetition_penalty, params.ignore_eos, params.min_tokens) == (1.5, True, 2)
    assert (list(params.stop_token_ids), dict(params.logit_bias)) == ([7], {5: -1.5})
    assert (params.seed, second.params.seed, params.n, params.max_tokens) == (9, 10, 1, 16)
    assert (first.priority, first.client, first.cache_salt) == (-3, "ada", "pepper")


@pytest.mark.parametrize(
    ("body", "defaults", "expected"),
    [
        ({}, {}, 16),
        ({"max_tokens": None}, {}, 97),
        ({}, {"max_tokens": 50}, 50),
        ({}, {"max_tokens": 5000}, 97),
        ({"max_tokens": 97}, {}, 97),
        ({"max_tokens": 98}, {}, 97),
        ({"max_tokens": 1_000_000}, {}, 97),
    ],
)
def test_the_output_limit(body, defaults, expected):
    """OpenAI's 16, the model's own default, or all the room there is, and never more."""
    engine = ScriptedEngine(sampling_defaults=defaults)
    assert post(engine, PATH, {"prompt": [5, 6, 7], **body}).status_code == 200
    assert engine.streams[0].params.max_tokens == expected


def test_the_output_limit_of_a_pool_smaller_than_the_window():
    """The same rule: what one request can hold is the room there is."""
    engine = ScriptedEngine(max_request_tokens=40)
    assert post(engine, PATH, {"prompt": [5] * 30, "max_tokens": 4096}).status_code == 200
    assert engine.streams[0].params.max_tokens == 10


def test_a_prompt_that_fills_the_window_can_be_scored():
    """Echo without an output: the engine is asked for the one token it needs, and no KV for it."""
    engine = ScriptedEngine()
    body = {"prompt": [5] * 100, "echo": True, "max_tokens": 0, "logprobs": 0}
    answer = post(engine, PATH, body).json()
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 100
    assert engine.streams[0].params.max_tokens == 1
    assert post(engine, PATH, {**body, "prompt": [5] * 101}).status_code == 400
    assert post(engine, PATH, {**body, "max_tokens": 1}).status_code == 400


def test_a_request_whose_step_failed_is_a_500():
    """Whole or streamed: what there was of it is not passed off as an answer.

    Why is for the log; that the model has no numbers for it is for the client too.
    """
    for reason, is_told in (("ValueError: /a/path", False), (NOT_FINITE, True)):
        end = RequestUpdate(Handle(0), (), FinishReason.ERROR, error=reason)
        script = lambda stream, end=end: [RequestUpdate(Handle(0), [Sample(40)]), end]  # noqa: E731
        response = post(ScriptedEngine(script), PATH, {"prompt": "x"})
        assert response.status_code == 500
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "engine_error")
        assert (reason in error["message"]) is is_told
        events = sse_events(post(ScriptedEngine(script), PATH, {"prompt": "x", "stream": True}))
        assert events[-1]["error"] == error


def test_a_stream():
    """One event per update; interleaved choices keep their index."""
    response = post(ScriptedEngine(says("fox")), PATH, {"prompt": "a", "n": 2, "stream": True})
    events = sse_events(response)
    assert {event["object"] for event in events} == {"text_completion"}
    assert all("usage" not in event for event in events)
    for index in range(2):
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == "fox"
        assert [choice["finish_reason"] for choice in own][-1] == "stop"
        assert all(choice["finish_reason"] is None for choice in own[:-1])


def test_usage_at_the_end_of_a_stream():
    """Null before it; no choices in it; running counts on request."""
    options = {"include_usage": True}
    body = {"prompt": "a", "stream": True, "stream_options": options}
    *chunks, last = sse_events(post(ScriptedEngine(says("fox")), PATH, body))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    options["continuous_usage_stats"] = True
    *chunks, last = sse_events(post(ScriptedEngine(says("fox")), PATH, body))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == list(range(1, len(chunks) + 1))
    assert last["usage"]["completion_tokens"] == counts[-1]


def test_usage_counts_all_choices():
    """Each event counts one token more than the one before, whichever choice it is of."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": ["a", "b"], "n": 3, "stream": True, "stream_options": options}
    *chunks, last = sse_events(post(ScriptedEngine(says("fox")), PATH, body))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == list(range(1, len(chunks) + 1))
    assert last["usage"]["completion_tokens"] == counts[-1] == 6 * len(TOKENIZER.encode("fox"))
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_told_to_the_engine(stream):
    """With the number of tokens that count; the reason names the string."""
    engine = ScriptedEngine(says("abENDcd", ends=None))
    response = post(engine, PATH, {"prompt": "a", "stop": ["END"], "stream": stream})
    count = len(TOKENIZER.encode("abEND", add_special_tokens=False))
    assert engine.streams[0].finished_at == count
    if stream:
        choices = [event["choices"][0] for event in sse_events(response)]
        assert "".join(choice["text"] for choice in choices) == "ab"
        last = choices[-1]
    else:
        [last] = response.json()["choices"]
        assert last["text"] == "ab"
        assert response.json()["usage"]["completion_tokens"] == count
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "END")


def test_logprobs():
    """Four lists; a token that is part of a character is named by its bytes."""
    body = {"prompt": "a", "logprobs": 2}
    [choice] = post(ScriptedEngine(says("x€")), PATH, body).json()["choices"]
    found = choice["logprobs"]
    ids = [*TOKENIZER.encode("x€", add_special_tokens=False), EOS]
    assert len(found["tokens"]) == len(ids) == len(found["text_offset"])
    assert found["tokens"][0] == "x"
    assert found["tokens"][1].startswith("bytes:\\xe2")
    assert found["token_logprobs"] == [-0.5] * len(ids)
    assert all(len(top) == 2 for top in found["top_logprobs"])
    assert found["text_offset"][:2] == [0, 1]


def test_echo_with_logprobs_begins_with_the_prompt():
    """Text, offsets and scores; the first token has none."""
    body = {"prompt": "the dog", "logprobs": 1, "echo": True, "max_tokens": 4}
    for stream in (False, True):
        response = post(ScriptedEngine(says("x")), PATH, {**body, "stream": stream})
        choices = (
            [event["choices"][0] for event in sse_events(response)]
            if stream
            else response.json()["choices"]
        )
        tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
        offsets = [offset for c in choices for offset in c["logprobs"]["text_offset"]]
        scores = [score for c in choices for score in c["logprobs"]["token_logprobs"]]
        text = "".join(choice["text"] for choice in choices)
        assert text == "the dogx"
        assert (tokens[0], tokens[-2:]) == ("<s>", ["x", "</s>"])
        assert scores == [None] + [-0.5] * (len(tokens) - 1)
        for token, offset in zip(tokens[1:-1], offsets[1:-1], strict=True):
            assert text[offset:].startswith(token)


def test_echo_alone_scores_the_prompt():
    """max_tokens 0: nothing is shown of what had to be generated."""
    body = {"prompt": "dog", "echo": True, "max_tokens": 0, "logprobs": 0}
    engine = ScriptedEngine(says("x", ends=FinishReason.LENGTH))
    answer = post(engine, PATH, body).json()
    [choice] = answer["choices"]
    assert engine.streams[0].params.max_tokens == 1
    assert choice["text"] == "dog"
    assert len(choice["logprobs"]["tokens"]) == len(TOKENIZER.encode("dog"))
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


CHATML = Tokenizer(tiny_tokenizers.chatml(), {}, None)
MARKED = "<|im_start|>user\nhello<|im_end|>"


@pytest.mark.parametrize("is_text", [True, False])
@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("as_ids", [True, False])
def test_offsets_point_behind_the_special_tokens_of_an_echo(is_text, skips, as_ids):
    """Given as text or as ids, however tokens are named, whatever outputs leave out."""
    body = {
        "prompt": MARKED if is_text else CHATML.encode(MARKED), "echo": True, "max_tokens": 0,
        "logprobs": 0, "skip_special_tokens": skips, "return_tokens_as_token_ids": as_ids,
    }  # fmt: skip
    engine = ScriptedEngine(says("x", ends=FinishReason.LENGTH))
    app = make_app(engine, tokenizer=CHATML)
    [choice] = call(app, "POST", PATH, json=body).json()["choices"]
    assert choice["text"] == MARKED
    assert choice["logprobs"]["text_offset"] == [0, 12, 14, 16, 17, 19, 21, 22]
    assert choice["logprobs"]["tokens"] == (
        [f"token_id:{token_id}" for token_id in CHATML.encode(MARKED)]
        if as_ids
        else ["<|im_start|>", "us", "er", "\n", "he", "ll", "o", "<|im_end|>"]
    )


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_of_every_prompt_is_echoed(stream):
    """Each with its own prompt; a text without the BOS that was put before it, ids with theirs."""
    for prompts in (["the dog", "<|user|>x€"], [TOKENIZER.encode("the"), [5, 6]]):
        body = {"prompt": prompts, "n": 2, "logprobs": 0, "echo": True, "stream": stream}
        response = post(ScriptedEngine(says("y€z")), PATH, body)
        bodies = sse_events(response) if stream else [response.json()]
        for index in range(4):
            given = prompts[index // 2]
            own = [c for body in bodies for c in body["choices"] if c["index"] == index]
            text = "".join(choice["text"] for choice in own)
            tokens = [token for choice in own for token in choice["logprobs"]["tokens"]]
            offsets = [offset for choice in own for offset in choice["logprobs"]["text_offset"]]
            prompt = given if isinstance(given, str) else TOKENIZER.decode(given, False)
            assert text == prompt + "y€z"
            assert offsets[-6:] == [len(prompt) + at for at in (0, 1, 1, 1, 2, 3)]
            for token, at in zip(tokens, offsets, strict=True):
                is_added = token == "</s>" or (token == "<s>" and isinstance(given, str))
                if not (is_added or token.startswith("bytes:")):
                    assert text[at:].startswith(token)


def test_an_output_completes_the_character_that_its_prompt_begins():
    """Two bytes of three in the prompt, the third in the output: one euro sign."""
    euro = TOKENIZER.encode("€", add_special_tokens=False)
    body = {"prompt": euro[:2], "echo": True, "logprobs": 0}
    engine = ScriptedEngine(
        lambda stream: [
            RequestUpdate(Handle(0), (), prompt_logprobs=[entry(euro[1], 0)]),
            RequestUpdate(Handle(0), [scored(stream, euro[2])], FinishReason.LENGTH, None, METRICS),
        ]
    )
    [choice] = post(engine, PATH, body).json()["choices"]
    assert choice["text"] == "€"
    assert choice["logprobs"]["text_offset"] == [0, 0, 0]
    [alone] = post(ScriptedEngine(says("x")), PATH, {**body, "max_tokens": 0}).json()["choices"]
    assert alone["text"] == TOKENIZER.decode(euro[:2])


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("includes", [False, True])
def test_tokens_that_a_stop_string_cut_stand_at_the_end_of_the_text(echo, includes):
    """All tokens are told; none of their offsets points behind the text."""
    body = {
        "prompt": "the dog", "stop": ["bEND"], "logprobs": 0, "echo": echo,
        "include_stop_str_in_output": includes,
    }  # fmt: skip
    [choice] = post(ScriptedEngine(says("abENDcd", ends=None)), PATH, body).json()["choices"]
    prompt = "the dog" if echo else ""
    assert choice["text"] == prompt + ("abEND" if includes else "a")
    assert choice["logprobs"]["tokens"][-5:] == list("abEND")
    cut = [0, 1, 2, 3, 4] if includes else [0, 1, 1, 1, 1]
    assert choice["logprobs"]["text_offset"][-5:] == [len(prompt) + at for at in cut]


def test_extras_on_request():
    """Token ids, prompt logprobs and metrics, whole and streamed."""
    body = {
        "prompt": "dog", "return_token_ids": True, "prompt_logprobs": 1, "return_metrics": True,
        "return_tokens_as_token_ids": True, "logprobs": 0,
    }  # fmt: skip
    prompt = TOKENIZER.encode("dog")
    output = [*TOKENIZER.encode("fox", add_special_tokens=False), EOS]
    [choice] = post(ScriptedEngine(says("fox")), PATH, body).json()["choices"]
    assert choice["prompt_token_ids"] == prompt
    assert choice["token_ids"] == output
    assert choice["metrics"]["queue_s"] == 1.0
    assert choice["logprobs"]["tokens"] == [f"token_id:{token_id}" for token_id in output]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1][str(prompt[1])]["rank"] == 1
    chunks = sse_events(post(ScriptedEngine(says("fox")), PATH, {**body, "stream": True}))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [i for choice in choices for i in choice["token_ids"]] == output
    assert [("prompt_token_ids" in c, "metrics" in c) for c in choices] == [
        (i == 0, i == len(choices) - 1) for i in range(len(choices))
    ]


def test_without_a_tokenizer_ids_go_in_and_out():
    """Texts, stop strings and echo are refused clearly."""
    engine = ScriptedEngine(says("fox"))
    app = make_app(engine, tokenizer=None)
    body = {"prompt": [5], "return_token_ids": True, "logprobs": 0}
    [choice] = call(app, "POST", PATH, json=body).json()["choices"]
    assert choice["text"] == ""
    assert choice["token_ids"][-1] == EOS
    for change in ({"prompt": "x"}, {"stop": "x"}, {"echo": True}):
        refused = call(app, "POST", PATH, json={**body, **change})
        assert refused.status_code == 400
        assert "tokenizer" in refused.json()["error"]["message"]


def test_a_failure_mid_stream_is_one_error_event():
    """Then [DONE]; the text before it was sent; nothing is left running."""
    engine = ScriptedEngine(fails("ab", RuntimeError("boom")))
    events = sse_events(post(engine, PATH, {"prompt": "a", "stream": True, "n": 2}))
    assert events[0]["choices"][0]["text"] == "a"
    assert events[-1]["error"]["type"] == "server_error"
    assert "boom" not in events[-1]["error"]["message"]
    assert all(stream.is_aborted or stream.is_ended for stream in engine.streams)


def test_a_failed_request_is_a_500():
    """A terminal update of kind error, streamed or not."""
    engine = ScriptedEngine(says("a", ends=FinishReason.ERROR))
    assert post(engine, PATH, {"prompt": "a"}).json()["error"]["code"] == "engine_error"
    events = sse_events(post(engine, PATH, {"prompt": "a", "stream": True}))
    assert events[-1]["error"]["code"] == "engine_error"
