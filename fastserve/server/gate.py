"""What every request passes: it calls the server by its name, shows the key, is measured, logged.

Rules: plain ASGI, so that streams pass through untouched; keys are compared in constant time;
a body is measured as it is read, whatever its headers say; a path means the same with a slash
behind it. An unexpected exception is logged with its request's name and answered with a 500.
Must not know: routes, what bodies say, the engine.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastserve.server.errors import ApiError, error_response, shortened, shutting_down
from fastserve.server.host_names import HostNames

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready"})  # need no key
WATCHED_PATHS = OPEN_PATHS | {"/version", "/metrics"}  # asked again and again: no line for each
OUR_ID = re.compile("[0-9a-f]{32}")
CLIENTS_ID = re.compile("[A-Za-z0-9._-]{1,128}")
MAX_SHOWN_HOST_BYTES = 256
MAX_SHOWN_PATH_BYTES = 512


class Gate:
    """Middleware around the whole app."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        host_names: HostNames,
        api_keys: Sequence[str],
        max_body_bytes: int,
        logs_requests: bool,
    ) -> None:
        """Guard `app`; no keys: open to all."""
        self._app = app
        self._host_names = host_names
        self._keys = [key.encode() for key in dict.fromkeys(api_keys)]
        self._max_body_bytes = max_body_bytes
        self._logs_requests = logs_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].endswith("/"):
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        headers = Headers(scope=scope)
        request_id = chosen_id(headers.get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        began = time.monotonic()
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            scope["state"]["tenant"] = self._check(scope["path"], headers)
            await self._app(scope, self._measured(receive), send_named)
        except ApiError as error:
            await error_response(error)(scope, receive, send_named)
        except asyncio.CancelledError:  # the server ends, and its body has not come in time
            if not status:
                await error_response(shutting_down())(scope, receive, send_named)
            raise
        except Exception:
            logger.exception("request %s failed", request_id)
            if status:
                raise  # the answer has begun; closing the connection is all that is left to say
            failure = ApiError(500, "The server failed.", code="internal_error")
            await error_response(failure)(scope, receive, send_named)
        finally:
            if self._logs_requests and scope["path"] not in WATCHED_PATHS:
                spent_ms = 1e3 * (time.monotonic() - began)
                logger.info(
                    "%s %s %d %.1f ms %s",
                    scope["method"], shown_path(scope), status, spent_ms, shown_id(request_id),
                )  # fmt: skip

    def _check(self, path: str, headers: Headers) -> str:
        """Return which key was shown, where there are several: its number, for it is a secret.

        Raises ApiError for a name that is not this server's, a missing or wrong key, or a body
        announced as too large.
        """
        tenant = ""
        if not self._host_names.has(host := headers.get("host")):
            raise ApiError(
                403,
                f"This server is not called {shortened(host or '', MAX_SHOWN_HOST_BYTES)}; "
                "--allowed-hosts names what else it may be called.",
                code="unknown_host",
            )
        if self._keys and path not in OPEN_PATHS:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            is_bearer = scheme.lower() == "bearer"
            given = key.strip().encode()
            matches = [secrets.compare_digest(given, known) for known in self._keys]
            if not is_bearer or not any(matches):
                raise ApiError(
                    401,
                    "Incorrect API key provided."
                    if is_bearer
                    else "You didn't provide an API key; send it as Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            if len(self._keys) > 1:
                tenant = str(matches.index(True))
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_body_bytes:
            raise self._too_large()
        return tenant

    def _measured(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def receive_measured() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_body_bytes:
                    raise self._too_large()
            return message

        return receive_measured

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The request body is larger than {self._max_body_bytes} bytes.",
            code="request_too_large",
        )


def chosen_id(given: str | None) -> str:
    """Return the client's request id if it is a plain word, else a new one."""
    if given and CLIENTS_ID.fullmatch(given):
        return given
    return uuid.uuid4().hex


def shown_id(request_id: str) -> str:
    """Return an id as a line of the log shows it.

    Eight of our digits tell requests apart and fit the line; a client's own is what it looks for.
    """
    return request_id[:8] if OUR_ID.fullmatch(request_id) else request_id


def shown_path(scope: Scope) -> str:
    """Return the path as it was sent: decoded, it could hold the end of the line."""
    sent: bytes = scope.get("raw_path") or scope["path"].encode()
    return shortened(sent.decode("ascii", errors="backslashreplace"), MAX_SHOWN_PATH_BYTES)


def request_id_of(scope: Scope) -> str:
    """Return the id under which a request is answered."""
    return str(scope["state"]["request_id"])


def tenant_of(scope: Scope) -> str:
    """Return who asks, as far as keys tell: "" where all requests show the same key, or none."""
    return str(scope["state"]["tenant"])
