"""Clients that leave: every choice of theirs is aborted, whatever it was doing."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.server.scripted import ScriptedEngine, make_app, says


async def leave(engine: ScriptedEngine, body: dict[str, Any], after: asyncio.Event) -> list[dict]:
    """Send a request, close the connection once `after` is set, and return what was answered."""
    content = json.dumps(body).encode()
    incoming = [{"type": "http.request", "body": content, "more_body": False}]
    answered: list[dict] = []

    async def receive():
        if incoming:
            return incoming.pop()
        await after.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        answered.append(dict(message))
        if message["type"] == "http.response.body":
            after.set()

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
        "scheme": "http", "root_path": "",
    }  # fmt: skip
    await make_app(engine)(scope, receive, send)
    return answered


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_a_stream_aborts_its_choices(n):
    """After something of it was sent."""
    engine = ScriptedEngine(says("abc", ends=None))

    async def run():
        body = {"prompt": "x", "n": n, "stream": True}
        answered = await leave(engine, body, asyncio.Event())
        assert answered[0]["status"] == 200

    asyncio.run(run())
    assert [stream.is_aborted for stream in engine.streams] == [True] * n


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_leaving_before_the_first_token_aborts_the_choices(stream, n):
    """Also where nothing would ever be written that could fail."""
    started = asyncio.Event()

    def silent(_):
        started.set()
        return []

    engine = ScriptedEngine(silent)

    async def run():
        await leave(engine, {"prompt": "x", "n": n, "stream": stream}, started)

    asyncio.run(run())
    assert [each.is_aborted for each in engine.streams] == [True] * n


def test_a_finished_answer_aborts_nothing():
    """The way out is the same, and harms none that has ended."""
    engine = ScriptedEngine(says("abc"))

    async def run():
        await leave(engine, {"prompt": "x", "n": 2}, asyncio.Event())

    asyncio.run(run())
    assert [stream.is_aborted for stream in engine.streams] == [False, False]
