"""What clients are told when something is wrong: one shape, OpenAI's, for every failure.

Rules: {"error": {"message", "type", "param", "code"}} and a status that says whose fault it is:
400 never 422; 503 with Retry-After while there is no engine to ask.
Must not know: routes, what was asked.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fastserve.client.interfaces import EngineDeadError
from fastserve.core.messages import RequestFailedError

INVALID = "invalid_request_error"


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
    if isinstance(error, EngineDeadError):
        return unavailable(f"The engine is dead: {error}", "engine_dead")
    if isinstance(error, RequestFailedError):
        return ApiError(500, str(error), code="engine_error")
    if isinstance(error, ValueError):  # the engine refused a request that can never run
        return invalid(str(error))
    return None


def error_body(error: ApiError) -> bytes:
    """Return the JSON of an error."""
    detail = ErrorDetail(error.message, error.kind, error.param, error.code)
    return msgspec.json.encode(ErrorBody(detail))


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
