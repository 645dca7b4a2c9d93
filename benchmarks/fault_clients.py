"""Clients of a server that comes to harm: what each was sent, when, and how it ended.

Rules: a request ends in exactly one way, by name: whole, with an error event (`error CODE`), with a
status (`503 CODE`), `refused` where the kernel took no connection in, `unanswered` where it did and
the connection ended before an answer began, or broken off. Must not know: which harm.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import httpx

from benchmarks.live_server import LiveServer

LOOK_S = 0.02  # between two looks at whether the server is ready
TIMEOUT_S = 300.0


def body_of(seed: int, max_tokens: int, *, temperature: float) -> dict[str, Any]:
    """Return a request for a stream of so many ids."""
    return {
        "prompt": f"Number {seed}: the for statement",
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


class Stream:
    """What has come of one request."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.times: list[float] = []  # of each event with ids
        self.end = ""  # while it has not ended

    def first_after(self, moment: float) -> float | None:
        """Return when the first ids came after a moment."""
        return next((at for at in self.times if at > moment), None)


class Unready(NamedTuple):
    """When the server was first seen not to be ready, and what /health said then."""

    at: float
    health: int


class Clients:
    """Requests to one server; leave the `async with` once all have ended."""

    def __init__(self, server: LiveServer) -> None:
        self._client = httpx.AsyncClient(
            base_url=f"http://{server.host}:{server.port}",
            timeout=TIMEOUT_S,
            limits=httpx.Limits(max_connections=None),
        )
        self._has_news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Clients:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    def open(self, body: dict[str, Any]) -> Stream:
        """Send a request."""
        stream = Stream()
        self._tasks.add(asyncio.create_task(self._run(body, stream)))
        return stream

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what news will bring about."""
        while not condition():
            self._has_news.clear()
            await self._has_news.wait()

    async def ended(self, streams: Sequence[Stream]) -> None:
        """Wait for the end of each."""
        await self.until(lambda: all(stream.end for stream in streams))

    async def seen_unready(self) -> Unready:
        """Ask until /ready is no 200."""
        while (await self._client.get("/ready")).status_code == 200:
            await asyncio.sleep(LOOK_S)  # another process: there is nothing to wait on
        at = time.monotonic()
        return Unready(at, (await self._client.get("/health")).status_code)

    async def _run(self, body: dict[str, Any], stream: Stream) -> None:
        stream.end = await self._answer(body, stream)
        self._has_news.set()

    async def _answer(self, body: dict[str, Any], stream: Stream) -> str:
        """Read one answer and return how it ended."""
        is_begun = False
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                is_begun = True
                if response.status_code != 200:
                    error = json.loads(await response.aread())["error"]
                    return f"{response.status_code} {error['code']}"
                if not body["stream"]:
                    whole = json.loads(await response.aread())
                    return end_of([json.dumps(whole), "[DONE]"], stream)
                events = []
                async for line in response.aiter_lines():
                    if line:
                        events.append(line.removeprefix("data: "))
                        self._note(events[-1], stream)
                return end_of(events, stream)
        except httpx.ConnectError:
            return "refused"
        except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
            return f"{'broken off' if is_begun else 'unanswered'}: {error!r}"

    def _note(self, event: str, stream: Stream) -> None:
        if event.startswith("{") and "choices" in (piece := json.loads(event)):
            (choice,) = piece["choices"]
            if ids := choice.get("token_ids"):
                stream.ids += ids
                stream.times.append(time.monotonic())
                self._has_news.set()


def end_of(events: Sequence[str], stream: Stream) -> str:
    """Return the one end that the events of an answer come to."""
    if len(events) < 2 or events[-1] != "[DONE]":
        return "broken off: no [DONE]"
    pieces = [json.loads(event) for event in events[:-1]]
    errors = [piece["error"]["code"] for piece in pieces if "error" in piece]
    reasons = [
        choice["finish_reason"]
        for piece in pieces
        for choice in piece.get("choices", ())
        if choice["finish_reason"] is not None
    ]
    if len(errors) + len(reasons) != 1:
        return f"broken off: {len(errors)} errors, {len(reasons)} reasons"
    return f"error {errors[0]}" if errors else "whole"
