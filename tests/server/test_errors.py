"""What is refused, with which status, in OpenAI's one shape."""

from __future__ import annotations

import msgspec
import pytest

from fastserve.client.interfaces import EngineDeadError
from fastserve.core.messages import RequestFailedError
from fastserve.server.app import create_app
from fastserve.server.errors import ENGINE_FAILED, shortened
from fastserve.settings.engine import EngineConfig
from fastserve.settings.server import ServerConfig
from tests.server.scripted import TOKENIZER, ScriptedEngine, call, fails, make_app, post

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


def error_of(response, status: int) -> dict:
    """Return the error of a response with this status; it has exactly OpenAI's four fields."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("change", "param", "says_so"),
    [
        ({"prompt": None}, "prompt", "string"),
        ({"prompt": {}}, "prompt", "string"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "at least one token"),
        ({"prompt": [1.5]}, "prompt", "prompt[0]"),
        ({"prompt": [5, "x"]}, "prompt", "prompt[1]"),
        ({"prompt": ["x", 5]}, "prompt", "prompt[1]"),
        ({"prompt": [[5], [-1]]}, "prompt", "prompt[1][0]"),
        ({"prompt": [True]}, "prompt", "prompt[0]"),
        ({"prompt": [300]}, "prompt", "out of vocabulary"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty", "1e-6"),
        ({"stop_token_ids": list(range(257))}, "stop_token_ids", "at most 256"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias", "at most 1024"),
        ({"user": "x" * 1025}, "user", "1024"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "16"),
        ({"metadata": {"a": "x" * 512}}, "metadata", "512"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": 2049}, "n", "2048"),
        ({"prompt": ["x"] * 1025, "n": 2}, "prompt", "2048"),
        ({"n": 10**30}, "n", "n"),
        ({"best_of": 2}, "best_of", "best_of"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": "many"}, "max_tokens", "integer"),
        ({"temperature": -0.1}, "temperature", "non-negative"),
        ({"top_p": 1.1}, "top_p", "(0, 1]"),
        ({"top_k": -2}, "top_k", "-1"),
        ({"min_tokens": 17}, "min_tokens", "max_tokens"),
        ({"presence_penalty": 3}, "presence_penalty", "[-2, 2]"),
        ({"logprobs": 21}, "logprobs", "[0, 20]"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "[0, 20]"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "integer"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "out of vocabulary"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "100"),
        ({"stop_token_ids": [300]}, "stop_token_ids", "out of vocabulary"),
        ({"stop": [""]}, "stop", "empty"),
        ({"stop": ["x"] * 65}, "stop", "64"),
        ({"stop": "x" * 1025}, "stop", "1024"),
        ({"stream_options": {}}, "stream_options", "stream"),
    ],
)
def test_invalid_values_name_their_field(change, param, says_so):
    """Always a 400, never a 422; nothing reaches the engine."""
    engine = ScriptedEngine()
    error = error_of(post(engine, COMPLETIONS, {"prompt": "x", **change}), 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert says_so in error["message"]
    assert not engine.streams


def test_a_minimum_leaves_some_token_to_be_drawn():
    """A small vocabulary, every token of which would stop."""
    engine = ScriptedEngine(vocab_size=200)
    body = {"prompt": [5], "min_tokens": 1, "stop_token_ids": list(range(200))}
    error = error_of(post(engine, COMPLETIONS, body), 400)
    assert error["param"] == "min_tokens"
    assert "no token" in error["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"prompt":"\\ud800"}', b"\xff"])
def test_bodies_that_are_no_request(content):
    """Malformed, empty, or not an object."""
    app = make_app(ScriptedEngine())
    error_of(call(app, "POST", COMPLETIONS, content=content, headers=JSON), 400)


@pytest.mark.parametrize("prompt", [[5] * 100, [5] * 150])
def test_a_prompt_beyond_the_window_is_refused(prompt):
    """vLLM's wording, OpenAI's code; a prompt that leaves no room for a token is too long."""
    error = error_of(post(ScriptedEngine(), COMPLETIONS, {"prompt": prompt, "max_tokens": 11}), 400)
    size = len(prompt)
    assert error["message"] == (
        f"This model's maximum context length is 100 tokens. However, you requested {size + 11} "
        f"tokens ({size} in the prompt, 11 in the completion). "
        "Please reduce the length of the prompt."
    )
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")


def test_a_prompt_beyond_the_whole_pool_is_refused():
    """A request that no eviction could make room for."""
    engine = ScriptedEngine(max_request_tokens=40)
    error = error_of(post(engine, COMPLETIONS, {"prompt": [5] * 40, "max_tokens": 1}), 400)
    assert "KV cache" in error["message"]
    assert error["code"] == "context_length_exceeded"
    assert post(engine, COMPLETIONS, {"prompt": [5] * 39, "max_tokens": 1}).status_code == 200


def test_more_tokens_than_there_is_room_for_cannot_be_the_least():
    """A limit is cut to the room there is; a promise of so many tokens is refused."""
    body = {"prompt": [5] * 90, "max_tokens": 50, "min_tokens": 11}
    error = error_of(post(ScriptedEngine(), COMPLETIONS, body), 400)
    assert (error["param"], error["code"]) == ("min_tokens", "context_length_exceeded")
    assert "leaves room for 10" in error["message"]


def test_unknown_names():
    """Routes, models and methods."""
    app = make_app(ScriptedEngine(), served_model_name=("mine",))
    assert "/v1/nothing" in error_of(call(app, "GET", "/v1/nothing"), 404)["message"]
    error = error_of(post(ScriptedEngine(), COMPLETIONS, {"prompt": "x", "model": "gpt"}), 404)
    assert error["message"].startswith("The model `gpt` does not exist")
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    error_of(call(app, "GET", "/v1/models/tiny"), 404)
    assert call(app, "GET", "/v1/models/mine").json()["id"] == "mine"
    response = call(app, "GET", COMPLETIONS)
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


def test_a_model_of_several_names():
    """All are listed and answered to; an answer bears the first."""
    app = make_app(ScriptedEngine(), served_model_name=("a", "b"))
    listed = call(app, "GET", "/v1/models").json()["data"]
    assert [card["id"] for card in listed] == ["a", "b"]
    assert {card["root"] for card in listed} == {"tiny"}
    assert call(app, "GET", "/v1/models/b").json()["id"] == "b"
    response = call(app, "POST", COMPLETIONS, json={"prompt": "x", "model": "b"})
    assert response.json()["model"] == "a"
    error_of(call(app, "POST", COMPLETIONS, json={"prompt": "x", "model": "tiny"}), 404)


def test_a_priority_is_refused_unless_it_is_enabled():
    """Nobody goes before others because they say so; 0 is what all have."""
    engine = ScriptedEngine()
    for priority in (-1, 7):
        error = error_of(post(engine, COMPLETIONS, {"prompt": "x", "priority": priority}), 400)
        assert error["param"] == "priority"
        chat = {"messages": [{"role": "user", "content": "x"}], "priority": priority}
        error_of(post(engine, "/v1/chat/completions", chat), 400)
    assert not engine.streams
    assert post(engine, COMPLETIONS, {"prompt": "x", "priority": 0}).status_code == 200
    enabled = post(engine, COMPLETIONS, {"prompt": "x", "priority": -1}, enable_priority=True)
    assert enabled.status_code == 200
    assert [stream.priority for stream in engine.streams] == [0, -1]


def test_a_full_queue_is_a_429():
    """With a time to come back."""
    engine = ScriptedEngine()
    engine.num_requests = 2
    response = post(engine, COMPLETIONS, {"prompt": "x"}, max_queued_requests=2)
    assert error_of(response, 429)["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) >= 1
    engine.num_requests = 1
    assert post(engine, COMPLETIONS, {"prompt": "x"}, max_queued_requests=2).status_code == 200


@pytest.mark.parametrize("body", [{"prompt": "x", "n": 4}, {"prompt": ["x", "y"], "n": 2}])
def test_every_choice_takes_a_place(body):
    """A 429 while all of them do not fit, a 400 where they never will."""
    engine = ScriptedEngine()
    engine.num_requests = 4
    assert post(engine, COMPLETIONS, body, max_queued_requests=8).status_code == 200
    engine.num_requests = 5
    error = error_of(post(engine, COMPLETIONS, body, max_queued_requests=8), 429)
    assert "no place for 4 more" in error["message"]
    engine.num_requests = 0
    error = error_of(post(engine, COMPLETIONS, body, max_queued_requests=3), 400)
    assert (error["param"], len(engine.streams)) == ("n", 4)


@pytest.mark.parametrize("state", ["loading", "shutting_down", "dead"])
def test_no_engine_is_a_503(state):
    """For work and for those who ask whether there may be some; models and metrics still answer."""
    engine = ScriptedEngine()
    app = make_app(engine)
    if state == "loading":
        engine.info, engine.is_ready = None, False
    elif state == "dead":
        engine.is_ready, engine.is_dead, engine.error = False, True, "it died"
    else:
        app.state.context.is_draining = True
    for method, path, body in (
        ("POST", COMPLETIONS, {"prompt": "x"}),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("POST", "/tokenize", {"prompt": "x"}),
        ("GET", "/ready", None),
    ):
        response = call(app, method, path, json=body)
        error = error_of(response, 503)
        assert state in (error["code"] or "")
        assert int(response.headers["retry-after"]) >= 1
    for path in ("/v1/models", "/metrics", "/version"):
        assert call(app, "GET", path).status_code == 200
    assert call(app, "GET", "/health").status_code == (503 if state == "dead" else 200)
    if state == "loading":
        assert "loading weights, 50%" in call(app, "GET", "/ready").json()["error"]["message"]


def test_an_engine_that_dies_is_a_503():
    """For requests under way that are not streamed."""
    engine = ScriptedEngine(fails("a", EngineDeadError("killed by signal 9")))
    error = error_of(post(engine, COMPLETIONS, {"prompt": "x", "n": 2}), 503)
    assert "killed" not in error["message"]


def test_a_request_that_ends_engines_is_a_500_of_its_own():
    """The log says why; a stream ends with the error and [DONE]."""
    engine = ScriptedEngine(fails("a", RequestFailedError("This request cannot be run: it died.")))
    error = error_of(post(engine, COMPLETIONS, {"prompt": "x"}), 500)
    assert (error["type"], error["code"]) == ("server_error", "engine_error")
    assert error["message"] == ENGINE_FAILED
    events = post(engine, COMPLETIONS, {"prompt": "x", "stream": True}).text.split("\n\n")
    assert '"engine_error"' in events[-3]
    assert events[-2] == "data: [DONE]"


def test_a_request_the_engine_rejects_is_a_400():
    """What only the engine can know."""
    engine = ScriptedEngine(fails("a", ValueError("no room for it")))
    assert error_of(post(engine, COMPLETIONS, {"prompt": "x"}), 400)["message"] == "no room for it"


def test_a_fault_of_ours_is_a_500_that_tells_nothing():
    """But for the name under which it was logged."""
    engine = ScriptedEngine(fails("a", RuntimeError("a secret path")))
    response = post(engine, COMPLETIONS, {"prompt": "x"})
    assert "secret" not in error_of(response, 500)["message"]
    assert response.headers["x-request-id"]


LONG = "<\\u0000" * 200_000  # in JSON: escapes, which take more room than what they stand for


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", COMPLETIONS, f'{{"prompt": "x", "model": "{LONG}"}}', 404),
        ("POST", COMPLETIONS, f'{{"prompt": "x", "{LONG}": 1, "{LONG}": 2}}', 400),
        ("POST", COMPLETIONS, f'{{"prompt": "x", "logit_bias": {{"{LONG}": 1}}}}', 400),
        ("POST", COMPLETIONS, f'{{"prompt": "x", "stream_options": {{"{LONG}": {{}}}}}}', 400),
        ("POST", CHAT, f'{{"messages": [{{"role": "{LONG}"}}]}}', 400),
        (
            "POST",
            CHAT,
            f'{{"messages": [{{"role": "user", "content": [{{"type": "{LONG}"}}]}}]}}',
            400,
        ),
        (
            "POST",
            CHAT,
            f'{{"messages": [{{"role": "user", "content": "x"}}], "tools": "{LONG}"}}',
            400,
        ),
        ("GET", "/v1/models/" + "x" * 60_000, None, 404),
        ("GET", "/" + "%00" * 20_000, None, 404),
    ],
    ids=lambda value: str(value)[:24],
)
def test_no_error_is_longer_than_4_kib(method, path, body, status):
    """Whatever it repeats of the request, it shows the beginning and the end of."""
    app = make_app(ScriptedEngine())
    answer = call(app, method, path, content=body, headers=JSON)
    error_of(answer, status)
    assert len(answer.content) <= 4096


@pytest.mark.parametrize("text", ["x" * 5000, "é" * 5000, "\0" * 5000, "a" * 4000 + "\0" * 1000])
def test_a_shortened_text_has_both_its_ends(text):
    """In no more bytes of JSON than are allowed."""
    short = shortened(text, 300)
    assert 150 <= len(msgspec.json.encode(short)) <= 300
    assert (short[0], short[-1]) == (text[0], text[-1])
    assert shortened("x" * 50, 300) == "x" * 50
    assert shortened("x" * 298, 300) == "x" * 298


def test_a_directory_tells_its_name_and_not_where_it_is(tmp_path):
    """Neither as a model's name nor as its root nor in an answer; requests may know it by both."""
    (tmp_path / "secret" / "llama").mkdir(parents=True)
    model = str(tmp_path / "secret" / "llama")
    app = create_app(ScriptedEngine(), TOKENIZER, None, EngineConfig(model=model), ServerConfig())
    card = call(app, "GET", "/v1/models").json()["data"][0]
    assert (card["id"], card["root"]) == ("llama", "llama")
    for name in ("llama", model):
        body = {"prompt": "x", "model": name}
        answer = call(app, "POST", COMPLETIONS, json=body)
        assert answer.status_code == 200
        assert "secret" not in answer.text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": "1"}, "n"), ({"n": True}, "n"), ({"n": 1.5}, "n"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": "1"}, "temperature"), ({"temperature": True}, "temperature"),
        ({"stream": "yes"}, "stream"), ({"stream": 1}, "stream"), ({"seed": "7"}, "seed"),
        ({"echo": "true"}, "echo"), ({"logit_bias": {"5": "1"}}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias"), ({"logprobs": "1"}, "logprobs"),
        ({"stream": True, "stream_options": {"include_usage": "no"}}, "stream_options"),
        ({"prompt": 5}, "prompt"), ({"stop": [5]}, "stop"), ({"user": 5}, "user"),
    ],
)  # fmt: skip
def test_types_are_not_guessed(change, param):
    """A number in quotes is none, and true is not 1; 2.0 is 2, for JSON has one kind of number."""
    engine = ScriptedEngine()
    error = error_of(post(engine, COMPLETIONS, {"prompt": "x", **change}), 400)
    assert error["param"] == param
    assert not engine.streams
    whole = {"prompt": "x", "n": 1.0, "max_tokens": 2.0, "temperature": 0, "logit_bias": {"5": 1}}
    assert post(engine, COMPLETIONS, whole).status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "x", "prompt": "y"}',
        b'{"prompt": "x", "prom\\u0070t": "y"}',
        b'{"prompt": "x", "stream_options": {"include_usage": true, "include_usage": false}}',
        b'{"prompt": "x", "metadata": [{"a": 1, "a": 1}]}',
    ],
)
def test_a_key_that_is_there_twice_is_refused(content):
    """Two readers of one body must not read two bodies."""
    engine = ScriptedEngine()
    answer = call(make_app(engine), "POST", COMPLETIONS, content=content, headers=JSON)
    assert "twice" in error_of(answer, 400)["message"]
    assert not engine.streams


def test_a_rejected_submission_leaves_nothing_running():
    """The prompts before it are aborted."""
    engine = ScriptedEngine()
    script = engine.script

    def refuse_third(stream):
        if len(engine.streams) == 3:
            raise ValueError("not this one")
        return script(stream)

    engine.script = refuse_third
    error_of(post(engine, COMPLETIONS, {"prompt": ["a", "b", "c", "d"]}), 400)
    assert [stream.is_aborted for stream in engine.streams] == [True, True, False]
