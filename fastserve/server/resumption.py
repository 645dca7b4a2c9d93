"""Streams that outlive their connection: a client that lost it comes back and gets the rest.

It sends its request once more, byte for byte, with the header `Last-Event-ID`: the id of the last
event that reached it, or what the answer's header of that name says when none did.
Rules: a task of its own writes down what a stream says (replay.py keeps it), so that neither a lost
connection nor an engine that is replaced ends it; only the API key that began a stream goes on with
it; of two readers the later one is served, and the other is told so. A stream that nobody reads for
the grace is forgotten, and what runs of it is aborted.
Must not know: what events say.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from fastserve.server.bodies import Bodies
from fastserve.server.errors import ApiError, invalid
from fastserve.server.event_stream import EventStream, error_events
from fastserve.server.gate import tenant_of
from fastserve.server.replay import EventGoneError, Replay, ReplayLimits, Replays

LAST_EVENT_ID = "Last-Event-ID"  # as browsers' EventSource spells it
NAME_BYTES = 16  # of randomness: whoever shows a name was told it
EVENT_ID = re.compile(r"(?P<name>[A-Za-z0-9_-]{22}):(?P<number>[0-9]{1,9})")


class Asker(NamedTuple):
    """Who began a stream, and what they asked."""

    tenant: str
    digest: bytes  # of the path and the body


def note_body(request: Request, content: bytes | bytearray) -> None:
    """Keep of a body, which is read once, what tells it from others."""
    path = request.scope["path"].encode()
    request.state.digest = hashlib.sha256(path + b"\n" + content).digest()


def asker_of(request: Request) -> Asker:
    """Return who asks, and what; its body has been noted."""
    return Asker(tenant_of(request.scope), request.state.digest)


class ResumableStream:
    """One stream: the task that writes it, and what its reader waits for."""

    def __init__(
        self,
        replays: Replays,
        replay: Replay,
        asker: Asker,
        pieces: AsyncGenerator[Sequence[bytes]],
        abort: Callable[[], None],
    ) -> None:
        self.replay = replay
        self.asker = asker
        self._replays = replays
        self._abort = abort
        self._has_news = asyncio.Event()
        self._has_room = asyncio.Event()
        self._writer = asyncio.create_task(self._write(pieces))

    async def _write(self, pieces: AsyncGenerator[Sequence[bytes]]) -> None:
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    for event in piece:
                        while not self._replays.has_room(self.replay):
                            self._has_news.set()
                            self._has_room.clear()
                            await self._has_room.wait()
                        self._replays.add(self.replay, event)
                    self._has_news.set()
        finally:
            self._abort()
            self._replays.end(self.replay)
            self._has_news.set()

    def abort(self) -> None:
        """End it now, unless it has ended."""
        self._writer.cancel()

    def resume(self, number: int) -> int:
        """Let a new reader go on after that event; return its number.

        Raises EventGoneError if an event after it is gone, ValueError if it has not come yet.
        """
        reader = self._replays.resume(self.replay, number)
        self._has_news.set()  # for the reader before it: there is none for that one any more
        return reader

    async def read(self, reader: int) -> AsyncGenerator[Sequence[bytes]]:
        """Yield what there is for a reader, to the end of the stream or until another one comes."""
        while self.replay.reader == reader:
            if self.replay.num_unread:
                events = self.replay.take()
                self._has_room.set()
                yield events
            elif self.replay.is_ended:
                return
            else:
                self._has_news.clear()
                await self._has_news.wait()
        told = ApiError(409, "Another connection reads this stream now.", code="stream_taken_over")
        yield error_events(told)


class ResumableStreams:
    """The streams of a server that their clients may come back to."""

    def __init__(self, limits: ReplayLimits) -> None:
        self._replays = Replays(limits)
        self._streams: dict[str, ResumableStream] = {}

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._streams)

    @property
    def num_bytes(self) -> int:
        """What is held of all of them."""
        return self._replays.num_bytes

    def begin(
        self,
        request: Request,
        pieces: AsyncGenerator[Sequence[bytes]],
        abort: Callable[[], None],
    ) -> Response:
        """Return the response to the request that begins a stream.

        `pieces` are the events that come together; `abort` ends what makes them, and harms nothing
        once that has ended.
        """
        name = secrets.token_urlsafe(NAME_BYTES)
        replay = Replay(name, on_drop=lambda: self._streams.pop(name).abort())
        asker = asker_of(request)
        stream = ResumableStream(self._replays, replay, asker, pieces, abort)
        self._streams[name] = stream
        return self._response(stream, replay.reader, 0)

    async def resume(self, request: Request, bodies: Bodies) -> Response | None:
        """Return the response that goes on with a stream; None if the request names none.

        204 where there is nothing after the event it names, which tells browsers to stop asking.
        Raises ApiError: 404 for a stream that is not there or not theirs, 409 for another request
        than began it, 410 where an event after the one named is gone, 400 where that has not come.
        """
        event_id = request.headers.get(LAST_EVENT_ID)
        if not event_id:
            return None
        async with bodies.read(request) as content:
            note_body(request, content)
        asker = asker_of(request)
        found = EVENT_ID.fullmatch(event_id)
        stream = None if found is None else self._streams.get(found["name"])
        if found is None or stream is None or stream.asker.tenant != asker.tenant:
            message = "The stream is not there, or no longer; ask anew, without Last-Event-ID."
            raise ApiError(404, message, param=LAST_EVENT_ID, code="stream_not_found")
        if stream.asker != asker:
            message = "Another request began this stream; send that one, byte for byte."
            raise ApiError(409, message, param=LAST_EVENT_ID, code="stream_mismatch")
        number = int(found["number"])
        if stream.replay.is_ended and number == stream.replay.num_events:
            return Response(status_code=204)
        try:
            reader = stream.resume(number)
        except EventGoneError as error:
            message = "Events after this one are no longer there; ask anew, without Last-Event-ID."
            raise ApiError(410, message, param=LAST_EVENT_ID, code="event_gone") from error
        except ValueError as error:
            raise invalid(f"In this stream {error}.", LAST_EVENT_ID) from error
        return self._response(stream, reader, number)

    def _response(self, stream: ResumableStream, reader: int, number: int) -> EventStream:
        headers = {LAST_EVENT_ID: stream.replay.id_of(number)}
        return EventStream(stream.read(reader), partial(self._leave, stream, reader), headers)

    def _leave(self, stream: ResumableStream, reader: int) -> None:
        loop = asyncio.get_running_loop()
        deadline = self._replays.leave(stream.replay, reader, loop.time())
        if deadline is not None:
            loop.call_at(deadline, self._replays.expire, deadline)
