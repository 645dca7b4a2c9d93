"""A streaming client of /v1/completions that costs little: one socket and one task per request.

Rules: an answer counts only if it is whole: status 200, the asked number of tokens, the reason
"length", the closing [DONE]. Anything else is a LostRequestError. Must not know: the workload.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from benchmarks.latency import Timing


class LostRequestError(Exception):
    """A request was not answered in full."""


class Ask(NamedTuple):
    """One request."""

    prompt: str
    num_output_tokens: int


async def ask(
    address: tuple[str, int],
    request: Ask,
    arrived_at: float,
    on_piece: Callable[[], None] = lambda: None,
) -> Timing:
    """Send one request, read its stream to the end and return its times (time.perf_counter)."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(http_request(address, request))
        first = last = longest_gap = 0.0
        finish_reason, num_tokens = None, 0
        async for event in events(reader):
            now = time.perf_counter()
            num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
            for choice in event["choices"]:
                finish_reason = choice["finish_reason"] or finish_reason
                if not choice["text"] and not choice["finish_reason"]:
                    continue
                if first:
                    longest_gap = max(longest_gap, now - last)
                first, last = first or now, now
                on_piece()
    finally:
        writer.close()
    if finish_reason != "length" or num_tokens != request.num_output_tokens:
        raise LostRequestError(
            f"{num_tokens} of {request.num_output_tokens} tokens, ended by {finish_reason}"
        )
    return Timing(arrived_at, first, last, longest_gap, num_tokens)


def http_request(address: tuple[str, int], request: Ask) -> bytes:
    """Return the bytes that ask for exactly `num_output_tokens` tokens."""
    fields = {
        "prompt": request.prompt,
        "max_tokens": request.num_output_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body = json.dumps(fields).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\n"
        "Content-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of a chunked event stream, up to [DONE].

    Raises LostRequestError if the answer is an error or breaks off.
    """
    try:
        status = await reader.readline()
        headers = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b" 200 " not in status:
            raise LostRequestError(f"{status.decode().strip()}: {(await reader.read())!r}")
        if b"transfer-encoding: chunked" not in headers:
            raise LostRequestError("the answer is not a chunked stream")
        buffer = b""
        while size := int(await reader.readline(), 16):
            buffer += (await reader.readexactly(size + 2))[:-2]
            *whole, buffer = buffer.split(b"\n\n")
            for line in whole:
                data = line.removeprefix(b"data: ")
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise LostRequestError(event["error"]["message"])
                yield event
    except (asyncio.IncompleteReadError, ConnectionError, ValueError) as error:
        raise LostRequestError(f"the stream broke off: {error!r}") from error
    raise LostRequestError("the stream ended without [DONE]")
