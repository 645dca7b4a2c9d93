"""The response that sends server-sent events as they come.

Rules: events that come together are one write; however it ends (all sent, client gone, server
stopping), `on_end` is called once. Must not know: what events say, who wrote them.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastserve.server.disconnect import ClientGoneError, unless_gone
from fastserve.server.errors import ApiError, error_body
from fastserve.server.responses import DONE

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """Sends events while the client is there."""

    media_type = "text/event-stream"

    def __init__(
        self,
        pieces: AsyncGenerator[Sequence[bytes]],
        on_end: Callable[[], None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(headers={**HEADERS, **(headers or {})})
        del self.headers["content-length"]
        self._pieces = pieces
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the response."""
        with contextlib.suppress(ClientGoneError):
            try:
                await unless_gone(receive, self._send_all(send))
            finally:
                self._on_end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self._pieces) as pieces:
            async for events in pieces:
                piece = b"".join(events)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def error_events(error: ApiError) -> tuple[bytes, bytes]:
    """Return how a stream ends that failed."""
    return b"data: " + error_body(error) + b"\n\n", DONE
