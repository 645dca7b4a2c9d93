"""Reads the body of a request as one of the protocol's types.

Rules: only JSON that says it is JSON is taken: a web page can post a form or plain text to any
address without asking, but not this. Bodies are parsed here and not by the framework, so that every
fault has one shape. A key that is there twice is a fault: who has read the body before, as a proxy
that checks it, may have read the other value. A parser cannot be interrupted, and what it makes of
some bytes is a hundred times as large: so there are only so many values in a large body, and such
bodies are counted and parsed in turns. Must not know: routes, what is done with a body.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import Headers

from fastserve.server.context import ServerContext
from fastserve.server.errors import ApiError, from_validation, invalid, shortened
from fastserve.server.json_size import json_size
from fastserve.server.protocol import Body
from fastserve.server.refused_fields import UnreadFields
from fastserve.server.resumption import note_body

B = TypeVar("B", bound=Body)
MAX_SHOWN_KEY_BYTES = 256
SMALL_BODY_BYTES = 4 * 2**10  # which may be parsed at once
PLAIN_BODY_BYTES = 64 * 2**10  # in which there is no room for too many values
MAX_PARTS = 2**17  # strings, containers and commas; more where the window has more ids
MAX_KEYS = 2**14


async def read_body(request: Request, model: type[B], context: ServerContext) -> B:
    """Return the body as `model`.

    415 unless its headers say that it is plain JSON; 400 when it is not, does not fit, or asks for
    what cannot be honoured; 413 when it has too many values.
    """
    check_media_type(request.headers)
    async with context.bodies.read(request) as content:
        if context.resumable is not None:
            note_body(request, content)
        if len(content) <= SMALL_BODY_BYTES:
            return parsed(content, model, context.unread_fields)
        if len(content) > PLAIN_BODY_BYTES:
            info = context.engine.info
            max_parts = MAX_PARTS if info is None else MAX_PARTS + info.max_model_len
            await context.parsing.run(lambda: check_size(content, max_parts))
        return await context.parsing.run(lambda: parsed(content, model, context.unread_fields))


def check_size(content: bytearray, max_parts: int) -> None:
    """Raise 413 for JSON of too many values."""
    size = json_size(content, max_parts)
    for count, limit, what in (
        (size.num_parts, max_parts, "values"),
        (size.num_keys, MAX_KEYS, "keys"),
    ):
        if count > limit:
            raise ApiError(
                413,
                f"The request body has more than {limit} {what}.",
                code="request_too_large",
            )


def parsed(content: bytearray, model: type[B], unread: UnreadFields) -> B:
    """Return a body's value; 400 for one that is none."""
    try:
        body = model.model_validate_json(content)
    except ValidationError as error:
        raise from_validation(error) from error
    check_keys(content)
    unread.check(body)
    return body


def check_keys(content: bytearray) -> None:
    """Raise 400 for JSON, known to be whole, in which an object has a key twice."""
    try:
        json.loads(content, object_pairs_hook=single)
    except ValueError as error:  # a number, too, of more digits than Python reads
        raise invalid(f"The request body cannot be read: {error}.") from error


def single(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; ValueError for a key that it has twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {shortened(twice, MAX_SHOWN_KEY_BYTES)!r} is there twice")
    return found


def check_media_type(headers: Headers) -> None:
    """Raise 415 for a body that is announced as anything but JSON, or as compressed."""
    given = headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    is_json = kind == "application/json" or (
        kind.startswith("application/") and kind.endswith("+json")
    )
    if not is_json:
        shown = f"got {given}" if given else "but there is none"
        raise unsupported(f"Content-Type must be application/json, {shown}.")
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise unsupported(
            f"Content-Encoding {encoding} is not supported; send the body as it is.",
            {"Accept-Encoding": "identity"},
        )


def unsupported(message: str, headers: dict[str, str] | None = None) -> ApiError:
    """Return a 415."""
    return ApiError(415, message, code="unsupported_media_type", headers=headers)
