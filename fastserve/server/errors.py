"""What clients are told when something is wrong: one shape, OpenAI's, for every failure.

Rules: {"error": {"message", "type", "param", "code"}} and a status that says whose fault it is:
400 never 422; 503 with Retry-After while there is no engine to ask. A body is no longer than
MAX_BODY_BYTES, whatever it repeats of the request; what went wrong inside the engine is for the
log. Clients are told what they can act on.
Must not know: routes, what was asked.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fastserve.client.interfaces import EngineDeadError, ShuttingDownError
from fastserve.core.messages import NotFiniteError, RequestFailedError

INVALID = "invalid_request_error"
ENGINE_FAILED = "The engine failed to run this request; the log of the server says why."
MAX_BODY_BYTES = 4096
MAX_MESSAGE_BYTES = 3072
MAX_PARAM_BYTES = 512
MAX_CHAR_BYTES = 6  # of one character in JSON: \u0000


class ErrorDetail(msgspec.Struct):
    """What a client is told of a failure."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """The body of every answer that is not 200."""

    error: ErrorDetail


class ApiError(HTTPException):
    """A failure with all that its client is told."""

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code, message, dict(headers) if headers else None)
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind or (INVALID if status_code < 500 else "server_error")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return a 400."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str, retry_after_s: int = 5) -> ApiError:
    """Return a 503: there is no engine now."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_after_s)})


def engine_dead() -> ApiError:
    """Return the 503 for good; the log has said why."""
    return unavailable("The engine is dead; the log of the server says why.", "engine_dead", 30)


def shutting_down() -> ApiError:
    """Return the 503 for what a stopping server does not finish, or does not begin.

    The next request is for another server, and is not to be sent on the same connection.
    """
    error = unavailable("The server is shutting down.", "shutting_down")
    error.headers = {**(error.headers or {}), "Connection": "close"}
    return error


def from_validation(error: ValidationError) -> ApiError:
    """Return the 400 for a body that does not fit its schema: the first fault, by name."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return invalid(f"The request body cannot be read: {first['msg']}.")
    path = [part for part in first["loc"] if not (isinstance(part, str) and part.startswith("as "))]
    if not path:
        return invalid(f"The request body is invalid: {first['msg']}.")
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return invalid(f"{name.lstrip('.')}: {first['msg']}.", param=str(path[0]))


def from_failure(error: Exception) -> ApiError | None:
    """Return what a client is told of an engine's failure; None for a fault of ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ShuttingDownError):
        return shutting_down()
    if isinstance(error, EngineDeadError):
        return engine_dead()
    if isinstance(error, NotFiniteError):
        return ApiError(500, f"This request cannot be run: {error}.", code="engine_error")
    if isinstance(error, RequestFailedError):
        return ApiError(500, ENGINE_FAILED, code="engine_error")
    if isinstance(error, ValueError):  # the engine refused a request that can never run
        return invalid(str(error))
    return None


def shortened(text: str, max_bytes: int) -> str:
    """Return a text whose JSON takes so many bytes at most: its beginning and its end."""
    if len(text) * MAX_CHAR_BYTES <= max_bytes:
        return text
    short, num_kept = text, min(len(text), max_bytes)
    while len(short) > max_bytes or len(msgspec.json.encode(short)) > max_bytes:
        num_kept = num_kept * 3 // 4
        short = f"{text[: num_kept * 2 // 3]} … {text[len(text) - num_kept // 3 :]}"
    return short


def error_body(error: ApiError) -> bytes:
    """Return the JSON of an error."""
    param = None if error.param is None else shortened(error.param, MAX_PARAM_BYTES)
    message = shortened(error.message, MAX_MESSAGE_BYTES)
    return msgspec.json.encode(ErrorBody(ErrorDetail(message, error.kind, param, error.code)))


def error_response(error: ApiError) -> Response:
    """Return the whole response for an error."""
    return Response(
        error_body(error), error.status_code, error.headers, media_type="application/json"
    )


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Answer what was raised as HTTPException, by us or by the router."""
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error_response(error)
    if error.status_code == 404:
        message = f"Invalid URL ({request.method} {request.url.path})"
    elif error.status_code == 405:
        message = f"Not allowed to {request.method} on {request.url.path}"
    else:
        message = str(error.detail)
    return error_response(ApiError(error.status_code, message, headers=error.headers))
