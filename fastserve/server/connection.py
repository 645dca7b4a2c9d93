"""One HTTP/1.1 connection: uvicorn's, with bounds on what a client may send, hold and leave undone.

Rules: bounded before trusted: what is here holds before a key is asked for. The parser keeps a line
until it ends and copies it whenever more comes; so what it was fed is counted, and it is fed in
pieces of a line at most. Whatever is awaited of a client is awaited for a bounded time. Bodies are
bounded where they are read. Must not know: routes, what bodies say, the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from fastserve.server.errors import ApiError, error_body, shutting_down
from fastserve.server.last_clients import has_unread

MAX_LINE_BYTES = 16 * 2**10
MAX_HEADER_BYTES = 64 * 2**10  # of one request: the request line, all headers, all trailers
MAX_HEADERS = 256  # of one request, trailers too
MAX_PIPELINED = 16  # requests that were sent before the one under way is answered

PHRASES = {
    400: b"Bad Request",
    408: b"Request Timeout",
    414: b"URI Too Long",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many connections there may be, and how long each may keep the server waiting."""

    num_connections: int
    head_s: float = 10.0  # for the head of a request, and for the rest of a body nobody reads
    write_s: float = 30.0  # without taking a byte of what is sent to it
    last_s: float = 1.0  # for the head of its request, of one that is new when the server ends


class BoundedConnection(HttpToolsProtocol):
    """One client's connection."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._num_header_bytes = 0  # of this request
        self._num_headers = 0  # of this request
        self._num_silent_bytes = 0  # that the parser was fed and has said nothing about
        self._is_in_head = False
        self._is_in_body = False
        self._is_last = False  # the request that comes, or is being answered: the server ends
        self._refusal = ApiError(400, "This is not an HTTP/1.1 request.")
        self._running: RequestResponseCycle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._num_unsent_bytes = 0

    # What comes in

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection in, or refuse it when there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.num_connections:
            self._refuse(
                ApiError(
                    503,
                    "The server has as many connections as it can take; retry later.",
                    code="too_many_connections",
                    headers={"Retry-After": "1"},
                )
            )
        else:
            self._await_client()

    def data_received(self, data: bytes) -> None:
        """Feed the parser, up to its bounds."""
        for piece in pieces(data):
            self._num_silent_bytes += len(piece)
            super().data_received(piece)
            if self._num_silent_bytes > MAX_LINE_BYTES and not self.transport.is_closing():
                self._refuse(too_large(431, f"A line is longer than {MAX_LINE_BYTES} bytes."))
            if self.transport.is_closing():
                return
        if self._is_in_head or not (self._is_in_body or self._is_answering()):
            self._await_client()

    def on_message_begin(self) -> None:
        """See the first byte of a request."""
        self._num_silent_bytes = self._num_header_bytes = self._num_headers = 0
        self._is_in_head = True
        if len(self.pipeline) >= MAX_PIPELINED:
            self._give_up(ApiError(400, f"More than {MAX_PIPELINED} requests are pipelined."))
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a piece of the request's target."""
        self._count_header(len(url))
        super().on_url(url)
        if len(self.url) > MAX_LINE_BYTES:
            self._give_up(too_large(414, f"The target is longer than {MAX_LINE_BYTES} bytes."))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header or a trailer."""
        if len(name) + len(value) > MAX_LINE_BYTES:
            self._give_up(too_large(431, f"A header is longer than {MAX_LINE_BYTES} bytes."))
        self._count_header(len(name) + len(value))
        self._num_headers += 1
        if self._num_headers > MAX_HEADERS:
            self._give_up(too_large(431, f"There are more than {MAX_HEADERS} headers."))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """See the end of a request's head."""
        self._is_in_head, self._is_in_body = False, True
        self._stop_awaiting()
        super().on_headers_complete()
        if self._is_last:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._num_silent_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See the end of a request."""
        self._is_in_body = False
        self._stop_awaiting()
        super().on_message_complete()

    def _count_header(self, num_bytes: int) -> None:
        self._num_silent_bytes = 0
        self._num_header_bytes += num_bytes
        if self._num_header_bytes > MAX_HEADER_BYTES:
            self._give_up(too_large(431, f"Headers are larger than {MAX_HEADER_BYTES} bytes."))

    # What goes out

    def pause_writing(self) -> None:
        """Watch a client that does not take what is sent."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """Trust it again."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def on_response_complete(self) -> None:
        """Go on to the next request, or see the last of the client."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_writing()
        elif self._is_in_body:  # the rest of a body that nobody reads
            self._await_client()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection."""
        super().timeout_keep_alive_handler()
        self._watch_writing()

    def send_400_response(self, msg: str) -> None:
        """Say why the parser was stopped; `msg` is uvicorn's reason, which is always the same."""
        self._refuse(self._refusal)

    def _give_up(self, refusal: ApiError) -> None:
        """Stop the parser, from inside one of its calls; `send_400_response` follows."""
        self._refusal = refusal
        raise refusal

    def _refuse(self, error: ApiError) -> None:
        """Close the connection, with a word where no answer has begun."""
        if not self._is_answering():
            headers = self.server_state.default_headers
            self.transport.write(b"".join(refusal_lines(error, headers)))
        self.transport.close()
        self._watch_writing()

    # Whose turn it is

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _is_answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _await_client(self) -> None:
        """Give the client its time, unless that is running already."""
        if self._read_timer is None:
            self._read_timer = self.loop.call_later(self._limits.head_s, self._end_waiting)

    def _stop_awaiting(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _end_waiting(self) -> None:
        self._read_timer = None
        if self._is_answering():  # it may have its next request ready in part
            self._await_client()
        elif self._is_in_head and self._is_last:
            self._refuse(shutting_down())
        elif self._is_in_head:
            self._refuse(ApiError(408, f"No request within {self._limits.head_s:g} s."))
        else:
            self.transport.close()
            self._watch_writing()

    def _watch_writing(self) -> None:
        if self._write_timer is None:
            self._num_unsent_bytes = self.transport.get_write_buffer_size()
            self._write_timer = self.loop.call_later(self._limits.write_s, self._judge_writing)

    def _judge_writing(self) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size() < self._num_unsent_bytes:
            self._watch_writing()
        else:
            self.transport.abort()

    def shutdown(self) -> None:
        """Answer one more request where one is there, begun, or still to come; close all others."""
        self._is_last = True
        if self.transport.is_closing():
            return
        descriptor = self.transport.get_extra_info("socket").fileno()
        is_new = self.cycle is None
        if not self._is_answering() and (is_new or self._is_in_head or has_unread(descriptor)):
            self._stop_awaiting()
            self._read_timer = self.loop.call_later(self._limits.last_s, self._end_waiting)
        else:
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the request under way, which may not be the latest, that its client has gone."""
        self._stop_awaiting()
        if self._write_timer is not None:
            self._write_timer.cancel()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)


def pieces(data: bytes) -> Iterator[bytes]:
    """Yield data in pieces of which none is longer than a line."""
    for start in range(0, len(data), MAX_LINE_BYTES):
        yield data[start : start + MAX_LINE_BYTES]


def too_large(status: int, message: str) -> ApiError:
    """Return the refusal of a head."""
    return ApiError(status, message, code="request_too_large")


def refusal_lines(error: ApiError, headers: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
    """Yield a whole response, after which the connection is closed."""
    body = error_body(error)
    yield b"HTTP/1.1 %d %s\r\n" % (error.status_code, PHRASES[error.status_code])
    for name, value in headers:
        yield b"%s: %s\r\n" % (name, value)
    for field, text in {**(error.headers or {}), "Connection": "close"}.items():
        yield f"{field}: {text}\r\n".encode()
    yield b"content-type: application/json\r\n"
    yield b"content-length: %d\r\n\r\n%s" % (len(body), body)
