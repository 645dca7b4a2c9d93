"""A streaming client of completions and chats that costs little: one socket per request, no tasks.

Rules: bytes are parsed where they arrive (C parsers for HTTP and JSON), and a piece bears the time
at which its bytes did. An answer counts only if it is whole: status 200, a finish reason, usage,
the closing [DONE]; or, where the reader wants so many tokens and no more, if it came that far.
Anything else is a LostRequestError. Must not know: the workload, reports.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import httptools
import msgspec


class LostRequestError(Exception):
    """A request was not answered in full."""


class Endpoint(NamedTuple):
    """Where requests go."""

    host: str
    port: int
    path: str = "/v1/completions"
    is_tls: bool = False
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class Answer:
    """One answer; times are those of time.perf_counter."""

    sent_at: float
    piece_times: list[float] = field(default_factory=list)  # of each event with text, ids or an end
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, Any] | None = None


_decoder = msgspec.json.Decoder(_Event)


async def ask(
    endpoint: Endpoint,
    fields: Mapping[str, Any],
    on_piece: Callable[[], None] = lambda: None,
    *,
    num_wanted: int | None = None,
) -> Answer:
    """Send one request and read its stream to the end, or to `num_wanted` tokens and hang up.

    Tokens are counted by their ids, so `num_wanted` needs `return_token_ids` in the fields. Tokens
    that came together with the last one wanted are not counted.

    Raises LostRequestError if the answer is an error, breaks off, or is shorter than `num_wanted`,
    or than `max_tokens` though `ignore_eos` is asked for; OSError if there is no connection.
    """
    loop = asyncio.get_running_loop()
    stream = _Stream(http_request(endpoint, fields), on_piece, loop.create_future(), num_wanted)
    transport, _ = await loop.create_connection(
        lambda: stream, endpoint.host, endpoint.port, ssl=endpoint.is_tls or None
    )
    try:
        await stream.done
    finally:
        transport.close()
    _check_length(stream.answer, fields, num_wanted)
    return stream.answer


def _check_length(answer: Answer, fields: Mapping[str, Any], num_wanted: int | None) -> None:
    """Raise LostRequestError for an answer that is shorter than was asked for."""
    if num_wanted is not None:
        limit, is_whole = num_wanted, answer.output_tokens == num_wanted
    elif fields.get("ignore_eos"):
        limit = fields.get("max_tokens", fields.get("max_completion_tokens"))
        is_whole = (answer.finish_reason, answer.output_tokens) == ("length", limit)
    else:
        return
    if not is_whole:
        raise LostRequestError(
            f"{answer.output_tokens} of {limit} tokens, ended by {answer.finish_reason}"
        )


def message_of(body: bytes) -> str:
    """Return what an error's body says to people: OpenAI's message, else all of it."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body.decode(errors="replace")


def http_request(endpoint: Endpoint, fields: Mapping[str, Any]) -> bytes:
    """Return the bytes of a POST after which the connection closes."""
    body = json.dumps(fields, separators=(",", ":")).encode()
    headers = (
        ("Host", f"{endpoint.host}:{endpoint.port}"),
        ("Content-Type", "application/json"),
        ("Connection", "close"),
        ("Content-Length", str(len(body))),
        *endpoint.headers,
    )
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"POST {endpoint.path} HTTP/1.1\r\n{lines}\r\n".encode() + body


class _Stream(asyncio.Protocol):
    """One connection: sends a request, takes its events apart as they arrive."""

    def __init__(
        self,
        request: bytes,
        on_piece: Callable[[], None],
        done: asyncio.Future[None],
        num_wanted: int | None,
    ) -> None:
        self.done = done
        self.answer = Answer(time.perf_counter())
        self._request = request
        self._on_piece = on_piece
        self._num_wanted = num_wanted
        self._parser = httptools.HttpResponseParser(self)
        self._status = 0
        self._bodies: list[bytes] = []
        self._rest = b""  # the beginning of an event

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        cast(asyncio.WriteTransport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        """Take bytes in."""
        now = time.perf_counter()
        if self.done.done():
            return
        try:
            self._parser.feed_data(data)
            if self._status == 200:
                self._take_events(now)
        except LostRequestError as error:
            self.done.set_exception(error)
        except (httptools.HttpParserError, msgspec.DecodeError) as error:
            self.done.set_exception(LostRequestError(f"the stream broke off: {error!r}"))

    def _take_events(self, now: float) -> None:
        *whole, self._rest = (self._rest + b"".join(self._bodies)).split(b"\n\n")
        self._bodies.clear()
        for event in whole:
            data = event.rpartition(b"\n")[2].removeprefix(b"data: ")  # an id may stand before
            if data == b"[DONE]":
                self.done.set_result(None)
                return
            self._take(_decoder.decode(data), now)
            if self._num_wanted is not None and self.answer.output_tokens >= self._num_wanted:
                self.answer.output_tokens = self._num_wanted
                self.done.set_result(None)
                return

    def _take(self, event: _Event, now: float) -> None:
        if event.error is not None:
            raise LostRequestError(str(event.error.get("message", event.error)))
        answer = self.answer
        if event.usage is not None:
            answer.prompt_tokens = event.usage.prompt_tokens
            answer.output_tokens = event.usage.completion_tokens
        for choice in event.choices:
            if choice.finish_reason is not None:
                answer.finish_reason = choice.finish_reason
            elif not (choice.text or choice.token_ids or (choice.delta and choice.delta.content)):
                continue
            answer.output_tokens += len(choice.token_ids or ())
            answer.piece_times.append(now)
            self._on_piece()

    def connection_lost(self, exc: Exception | None) -> None:
        """See the end of the connection: before [DONE] it came too early."""
        if self.done.done():
            return
        if self._status not in (0, 200):
            text = f"{self._status}: {message_of(b''.join(self._bodies))}"
        elif self._is_complete:
            text = "the stream ended without [DONE]"
        else:
            text = f"the stream broke off: {exc!r}"
        self.done.set_exception(LostRequestError(text))

    # ── what the parser of HTTP calls ────────────────────────────────────────────────────────

    _is_complete = False

    def on_headers_complete(self) -> None:
        """See the status."""
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body."""
        self._bodies.append(body)

    def on_message_complete(self) -> None:
        """See the last chunk."""
        self._is_complete = True
