"""Describes the routes, to generate clients and tests from: /openapi.json.

Rules: one table says what each route takes and answers; bodies come from protocol.py and
responses.py themselves. A status that is not here is never answered.
Must not know: how a route answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from fastserve.frontend.request_checks import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_SALT_CHARS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
)
from fastserve.server import protocol, responses
from fastserve.server.errors import ErrorBody
from fastserve.server.gate import OPEN_PATHS
from fastserve.server.resumption import LAST_EVENT_ID

JSON = "application/json"
EVENTS = "text/event-stream"
SCHEMAS = "#/components/schemas/"
BEARER = "bearer"

ERRORS: Mapping[int, str] = {
    400: "The request cannot be honoured; the error names the field.",
    401: "No API key, or a wrong one.",
    403: "The Host header names another server.",
    404: "There is no such model.",
    413: "The body is larger than the server takes.",
    415: "The body is not announced as plain JSON.",
    429: "The server holds as many requests as it takes; retry later.",
    500: "The server failed.",
    503: "There is no engine now: loading, stopping or dead.",
    504: "The answer was not complete in the time that it was given.",
}


# What a request for the rest of a stream may get besides, where streams can be resumed.
RESUMPTION: Mapping[int, str] = {
    204: "Nothing comes after the event that Last-Event-ID names.",
    404: "There is no such model, or no such stream to go on with.",
    409: "Another request began the stream that Last-Event-ID names.",
    410: "Events after the one that Last-Event-ID names are no longer there.",
}
LAST_EVENT_PARAMETER: Mapping[str, Any] = {
    "name": LAST_EVENT_ID,
    "in": "header",
    "description": "The last event received of a stream; the same request gets the rest.",
    "schema": {"type": "string"},
}


class Completion(responses.Answer):
    """A completion."""

    choices: Sequence[responses.CompletionChoice]


class ChatCompletion(responses.Answer):
    """A chat answer."""

    choices: Sequence[responses.ChatChoice]


class ChatCompletionChunk(responses.Answer):
    """A piece of a chat answer."""

    choices: Sequence[responses.ChatChunkChoice]


class Route(NamedTuple):
    """What a route takes and what it answers; `events` are the payloads of a stream."""

    answer: type[msgspec.Struct] | None
    errors: tuple[int, ...]
    body: type[protocol.Body] | None = None
    events: type[msgspec.Struct] | None = None
    media_type: str = JSON


POSTED = (400, 404, 413, 415)
ROUTES: Mapping[tuple[str, str], Route] = {
    ("/v1/completions", "post"): Route(
        Completion, (*POSTED, 429, 500, 503, 504), protocol.CompletionRequest, Completion
    ),
    ("/v1/chat/completions", "post"): Route(
        ChatCompletion,
        (*POSTED, 429, 500, 503, 504),
        protocol.ChatCompletionRequest,
        ChatCompletionChunk,
    ),
    ("/tokenize", "post"): Route(
        responses.TokenizeResponse, (*POSTED, 500, 503), protocol.TokenizeRequest
    ),
    ("/detokenize", "post"): Route(
        responses.DetokenizeResponse, (*POSTED, 500, 503), protocol.DetokenizeRequest
    ),
    ("/v1/models", "get"): Route(responses.ModelList, (500,)),
    ("/v1/models/{name}", "get"): Route(responses.ModelCard, (404, 500)),
    ("/health", "get"): Route(None, (500, 503)),
    ("/ready", "get"): Route(responses.Ready, (500, 503)),
    ("/version", "get"): Route(responses.Version, (500,)),
    ("/metrics", "get"): Route(None, (500,), media_type=CONTENT_TYPE_LATEST),
}

# What admission.py takes, where a type alone does not say it.
RANGES: Mapping[str, Mapping[str, Any]] = {
    "n": {"minimum": 1, "maximum": MAX_CHOICES},
    "temperature": {"minimum": 0},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1},
    "min_p": {"minimum": 0, "maximum": 1},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "repetition_penalty": {"minimum": 1e-6},
    "logit_bias": {
        "propertyNames": {"pattern": "^[0-9]+$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "max_tokens": {"minimum": 1},
    "max_completion_tokens": {"minimum": 1},
    "min_tokens": {"minimum": 0},
    "messages": {"minItems": 1},
    "stop": {"minLength": 1, "maxLength": MAX_STOP_CHARS, "maxItems": MAX_STOP_STRINGS},
    "cache_salt": {"minLength": 1, "maxLength": MAX_SALT_CHARS},
    "logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "top_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "prompt_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
}


def describe(app: FastAPI, *, has_keys: bool, resumes_streams: bool) -> dict[str, Any]:
    """Return the OpenAPI description of an app."""
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schema["components"] = {"schemas": components()}
    if has_keys:
        schema["components"]["securitySchemes"] = {BEARER: {"type": "http", "scheme": "bearer"}}
    paths = {path.replace(":path", ""): methods for path, methods in schema["paths"].items()}
    schema["paths"] = paths
    for (path, method), route in ROUTES.items():
        operation = paths[path][method]
        is_guarded = has_keys and path not in OPEN_PATHS
        operation["responses"] = answers(route, is_guarded)
        if is_guarded:
            operation["security"] = [{BEARER: []}]
        if route.body is not None:
            operation["requestBody"] = {"required": True, "content": content(route.body.__name__)}
        if resumes_streams and route.events is not None:
            add_resumption(operation)
    return schema


def add_resumption(operation: dict[str, Any]) -> None:
    """Say of a route that its streams can be resumed."""
    operation["parameters"] = [LAST_EVENT_PARAMETER]
    for status, text in RESUMPTION.items():
        told = {} if status == 204 else {"content": content("ErrorBody")}
        operation["responses"][str(status)] = {"description": text, **told}
    operation["responses"] = dict(sorted(operation["responses"].items()))


def components() -> dict[str, Any]:
    """Return the schemas of all bodies, taken and answered, by name."""
    found: dict[str, Any] = {}
    answered: set[type[msgspec.Struct]] = {ErrorBody}
    for route in ROUTES.values():
        answered.update(kind for kind in (route.answer, route.events) if kind is not None)
        if route.body is not None:
            body = route.body.model_json_schema(ref_template=SCHEMAS + "{model}")
            found.update(body.pop("$defs", {}))
            found[route.body.__name__] = with_ranges(body)
    names = sorted(answered, key=lambda kind: kind.__name__)
    _, schemas = msgspec.json.schema_components(names, ref_template=SCHEMAS + "{name}")
    return found | schemas


def with_ranges(body: dict[str, Any]) -> dict[str, Any]:
    """Write the ranges of a request's fields into its schema."""
    for name, bounds in RANGES.items():
        if name in body["properties"]:
            narrow(body["properties"][name], bounds)
    return body


def narrow(schema: dict[str, Any], bounds: Mapping[str, Any]) -> None:
    """Add each bound to the arm of a schema whose type it is about."""
    for arm in schema.get("anyOf", schema.get("oneOf", ())):
        narrow(arm, bounds)
    if "items" in schema:
        narrow(schema["items"], bounds)
    for bound, value in bounds.items():
        if schema.get("type") in TYPES_OF_BOUNDS[bound]:
            schema[bound] = value


NUMBERS = ("integer", "number")
TYPES_OF_BOUNDS: Mapping[str, tuple[str, ...]] = {
    "minimum": NUMBERS,
    "exclusiveMinimum": NUMBERS,
    "maximum": NUMBERS,
    "minLength": ("string",),
    "maxLength": ("string",),
    "minItems": ("array",),
    "maxItems": ("array",),
    "propertyNames": ("object",),
    "additionalProperties": ("object",),
}


def answers(route: Route, is_guarded: bool) -> dict[str, Any]:
    """Return every status of a route with its bodies."""
    told: dict[str, Any] = {"200": {"description": "OK"}}
    if route.answer is not None:
        told["200"]["content"] = content(route.answer.__name__)
    elif route.media_type != JSON:
        told["200"]["content"] = {route.media_type: {"schema": {"type": "string"}}}
    if route.events is not None:
        told["200"]["content"][EVENTS] = {"itemSchema": event(route.events.__name__)}
    for status in sorted({403, *route.errors, *((401,) if is_guarded else ())}):
        told[str(status)] = {"description": ERRORS[status], "content": content("ErrorBody")}
    return told


def content(name: str) -> dict[str, Any]:
    """Return the JSON content of that type."""
    return {JSON: {"schema": {"$ref": SCHEMAS + name}}}


def event(name: str) -> dict[str, Any]:
    """Return the schema of one server-sent event: a JSON text, an error's perhaps, or the end."""
    bodies = {"anyOf": [{"$ref": SCHEMAS + name}, {"$ref": SCHEMAS + "ErrorBody"}]}
    text = {"type": "string", "contentMediaType": JSON, "contentSchema": bodies}
    data = {"anyOf": [text, {"const": "[DONE]"}]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}
