"""A client that loses its connection after so many bytes, and comes back for the rest.

Rules: raw sockets, so that a cut falls on any byte, of the headers and of the framing too; only
events that arrived whole count, and the last of them is where it goes on. Must not know: what
events say, why it is cut.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httptools

from fastserve.bench.stream_client import Endpoint, LostRequestError, http_request, message_of

READ_BYTES = 65_536
EVENT_ID = re.compile(rb"^id: (\S+)$", re.MULTILINE)


@dataclass(slots=True)
class Received:
    """What of one answer arrived."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_whole: bool = False
    num_raw_bytes: int = 0  # of headers and framing too

    @property
    def events(self) -> bytes:
        """The events of the body that arrived whole."""
        return self.body[: self.body.rfind(b"\n\n") + 2] if b"\n\n" in self.body else b""

    @property
    def last_event_id(self) -> str | None:
        """With what one goes on; None while the headers have not arrived, or name nothing."""
        ids = EVENT_ID.findall(self.events)
        return ids[-1].decode() if ids else self.headers.get("last-event-id")


class _Parts:
    """What the parser of HTTP calls."""

    def __init__(self, received: Received) -> None:
        self._received = received

    def on_header(self, name: bytes, value: bytes) -> None:
        self._received.headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self._received.body += body

    def on_message_complete(self) -> None:
        self._received.is_whole = True


async def receive(
    endpoint: Endpoint,
    fields: Mapping[str, Any],
    *,
    num_bytes: int | None = None,
    last_event_id: str | None = None,
) -> Received:
    """Send a request, read so many bytes of what comes or all of it, and break the connection.

    Raises OSError if there is no connection.
    """
    if last_event_id is not None:
        endpoint = endpoint._replace(headers=(*endpoint.headers, ("Last-Event-ID", last_event_id)))
    return await exchange(endpoint, http_request(endpoint, fields), num_bytes)


async def exchange(endpoint: Endpoint, request: bytes, num_bytes: int | None = None) -> Received:
    """Do the same for the bytes of a request."""
    received = Received()
    parser = httptools.HttpResponseParser(_Parts(received))
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    try:
        writer.write(request)
        while not received.is_whole:
            left = READ_BYTES if num_bytes is None else num_bytes - received.num_raw_bytes
            if not left:
                break
            data = await reader.read(min(left, READ_BYTES))
            if not data:
                break
            received.num_raw_bytes += len(data)
            parser.feed_data(data)
    finally:
        writer.transport.abort()
    if received.headers:
        received.status = parser.get_status_code()
    return received


@dataclass(frozen=True, slots=True)
class Resumed:
    """A stream that was read in several pieces."""

    events: bytes
    num_resumed: int  # times that an event id was shown
    last_event_id: str | None


async def receive_in_pieces(
    endpoint: Endpoint,
    fields: Mapping[str, Any],
    cuts: Sequence[int],
    on_cut: Callable[[], None] = lambda: None,
) -> Resumed:
    """Read a stream whose connection breaks after so many bytes, each time anew, then to its end.

    A connection that breaks before its headers have come leaves nothing to go on with: the request
    begins anew. Raises LostRequestError for an answer that is refused or breaks off by itself.
    """
    events, event_id, num_resumed = b"", None, 0
    for num_bytes in (*cuts, None):
        num_resumed += event_id is not None
        got = await receive(endpoint, fields, num_bytes=num_bytes, last_event_id=event_id)
        if got.status == 204:  # all of it had arrived
            break
        if got.is_whole and got.status != 200:
            raise LostRequestError(f"{got.status}: {message_of(got.body)}")
        events += got.events
        event_id = got.last_event_id or event_id
        if got.is_whole:
            break
        if num_bytes is None or got.num_raw_bytes < num_bytes:
            raise LostRequestError(f"the stream broke off after {got.num_raw_bytes} bytes")
        on_cut()
    return Resumed(events, num_resumed, event_id)
