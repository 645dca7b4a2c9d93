"""How a request of a server that comes to harm ends, by name."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing

import pytest

from benchmarks.fault_clients import Clients, body_of
from benchmarks.live_server import LiveServer

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": [{"finish_reason": null, "token_ids": [5]}]}\n\n'
ERROR = b'data: {"error": {"code": "shutting_down"}}\n\ndata: [DONE]\n\n'
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 32\r\n\r\n"
    b'{"error":{"code":"engine_dead"}}'
)


def chunk(data: bytes) -> bytes:
    """Return a piece of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


async def end_of_one(host: str, port: int) -> str:
    """Send one request and return how it ended."""
    async with Clients(LiveServer(host, port, None)) as clients:  # type: ignore[arg-type]
        stream = clients.open(body_of(0, 4, temperature=0))
        await clients.ended([stream])
        return stream.end


@pytest.mark.parametrize(
    ("told", "end"),
    [
        (b"", "unanswered"),
        (HEAD + chunk(EVENT), "broken off"),
        (HEAD + chunk(EVENT) + b"0\r\n\r\n", "broken off: no [DONE]"),
        (HEAD + chunk(EVENT + ERROR) + b"0\r\n\r\n", "error shutting_down"),
        (REFUSAL, "503 engine_dead"),
    ],
)
def test_an_end_is_told_by_what_came(told: bytes, end: str) -> None:
    """Of a connection that was taken in."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(told)
        writer.close()

    async def run() -> str:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            return await end_of_one(*server.sockets[0].getsockname()[:2])

    assert asyncio.run(run()).startswith(end)


def test_nobody_listens() -> None:
    """The kernel says so: no request went out."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        place = listener.getsockname()
    assert asyncio.run(end_of_one(*place)) == "refused"
