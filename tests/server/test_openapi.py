"""/openapi.json says what the server really takes and answers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

from fastserve.server.openapi import RANGES, ROUTES
from tests.server.scripted import ScriptedEngine, call, make_app, post, says
from tests.server.test_completion import sse_events

CHAT = {"messages": [{"role": "user", "content": "x"}]}
SHOWS_ALL = {"return_token_ids": True, "prompt_logprobs": 1, "return_metrics": True}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [{"prompt": "x"}, {"prompt": "x", "logprobs": 2, "echo": True, **SHOWS_ALL}],
    "/v1/chat/completions": [CHAT, {**CHAT, "logprobs": True, "top_logprobs": 2, **SHOWS_ALL}],
    "/tokenize": [{"prompt": "x"}, {"prompt": "x", "return_token_strs": True}],
    "/detokenize": [{"tokens": [5]}],
}


@functools.cache
def description(**server: Any) -> dict[str, Any]:
    """Return what /openapi.json says."""
    app = make_app(ScriptedEngine(), **server)
    headers = {"Authorization": "Bearer key"}
    return call(app, "GET", "/openapi.json", headers=headers).json()


def validator(schema: dict[str, Any], part: dict[str, Any]) -> jsonschema_rs.Validator:
    """Return what judges a value by a schema that refers to the components of a description."""
    return jsonschema_rs.validator_for({"components": schema["components"], **part})


def test_every_reference_leads_somewhere():
    """And nothing is described that is not used."""
    schema = description()

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (v for k, v in value.items() if k == "$ref")
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                yield from references(item)

    names = {ref.removeprefix("#/components/schemas/") for ref in references(schema)}
    assert names == set(schema["components"]["schemas"])


def test_every_route_is_described():
    """With all its statuses, none of FastAPI's own, and no route besides."""
    schema = description()
    described = {
        (path, method): operation
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    }
    assert described.keys() == ROUTES.keys()
    for key, operation in described.items():
        statuses = set(operation["responses"])
        assert statuses == {"200", "403", *map(str, ROUTES[key].errors)}
        assert "422" not in statuses


@pytest.mark.parametrize("has_key", [True, False])
def test_the_key_is_asked_for_where_it_is_needed(has_key):
    """Guarded routes name the scheme and answer 401; others, and a server without keys, do not."""
    schema = description(**({"api_key": ("key",)} if has_key else {}))
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            is_guarded = has_key and path not in ("/health", "/ready")
            assert operation.get("security") == ([{"bearer": []}] if is_guarded else None)
            assert ("401" in operation["responses"]) is is_guarded
    schemes = schema["components"].get("securitySchemes")
    assert schemes == ({"bearer": {"type": "http", "scheme": "bearer"}} if has_key else None)


@pytest.mark.parametrize(
    ("path", "body"), [(path, body) for path, bodies in BODIES.items() for body in bodies]
)
def test_answers_have_the_described_shape(path, body):
    """With and without extras."""
    schema = description()
    told = schema["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]
    response = post(ScriptedEngine(says("fox")), path, body)
    assert response.status_code == 200
    validator(schema, told["schema"]).validate(response.json())
    request = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    validator(schema, request["schema"]).validate(body)


@pytest.mark.parametrize(
    ("path", "body"),
    [(path, body) for path in ("/v1/completions", "/v1/chat/completions") for body in BODIES[path]],
)
def test_events_have_the_described_shape(path, body):
    """Each chunk of a stream, the one with usage too."""
    schema = description()
    told = schema["paths"][path]["post"]["responses"]["200"]["content"]
    assert set(told) == {"application/json", "text/event-stream"}
    events = ROUTES[path, "post"].events
    assert events is not None
    judge = validator(schema, {"$ref": f"#/components/schemas/{events.__name__}"})
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    response = post(ScriptedEngine(says("fox")), path, body)
    assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
    for event in sse_events(response):
        judge.validate(event)


# Field → values at a bound, and values just beyond it.
BOUNDS: dict[str, tuple[tuple[Any, Any], ...]] = {
    "n": ((1, 0), (2, 2049)),
    "temperature": ((0, -0.01),),
    "top_p": ((0.01, 0), (1, 1.01)),
    "top_k": ((-1, -2),),
    "min_p": ((0, -0.01), (1, 1.01)),
    "presence_penalty": ((-2, -2.01), (2, 2.01)),
    "frequency_penalty": ((-2, -2.01), (2, 2.01)),
    "repetition_penalty": ((1e-6, 9e-7),),
    "logit_bias": (({"5": -100}, {"5": -101}), ({"5": 100}, {"5": 101}), ({"5": 1}, {"x": 1})),
    "max_tokens": ((1, 0),),
    "max_completion_tokens": ((1, 0),),
    "min_tokens": ((0, -1),),
    "stop": (("x", ""), ("x" * 1024, "x" * 1025), (["x"] * 64, ["x"] * 65), (["x"], [""])),
    "messages": ((CHAT["messages"], []),),
    "cache_salt": (("x", ""), ("x" * 1024, "x" * 1025)),
    "logprobs": ((0, -1), (20, 21)),
    "top_logprobs": ((0, -1), (20, 21)),
    "prompt_logprobs": ((0, -1), (20, 21)),
}
CASES = [(name, *pair) for name, pairs in BOUNDS.items() for pair in pairs]
PARTNERS: dict[str, dict[str, Any]] = {"top_logprobs": {"logprobs": True}}


def test_every_described_range_is_tried() -> None:
    """Below, on both sides of each bound."""
    assert BOUNDS.keys() == RANGES.keys()


@pytest.mark.parametrize(("name", "at", "beyond"), CASES)
def test_ranges_are_those_that_are_kept(name, at, beyond):
    """The value at a bound is taken and one beyond it refused, by schema and server alike."""
    schema = description()
    for path in ("/v1/completions", "/v1/chat/completions"):
        request = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        judge = validator(schema, request["schema"])
        properties = schema["components"]["schemas"][request["schema"]["$ref"].split("/")[-1]]
        if name not in properties["properties"] or (
            path != "/v1/completions" and name == "logprobs"
        ):
            continue
        plain = {**BODIES[path][0], **PARTNERS.get(name, {})}
        inside, outside = {**plain, name: at}, {**plain, name: beyond}
        assert (judge.is_valid(inside), judge.is_valid(outside)) == (True, False), path
        assert post(ScriptedEngine(says("x")), path, inside).status_code == 200
        response = post(ScriptedEngine(says("x")), path, outside)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name
