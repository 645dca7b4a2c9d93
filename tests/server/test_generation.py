"""Choices are begun in turns; of clients that leave every one is aborted, whatever it does."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import httpx
import pytest

from fastserve.core.request import Arrival
from fastserve.server.generation import CHOICES_A_TURN
from tests.server.scripted import Item, ScriptedEngine, ScriptedStream, make_app, says


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


class WatchedEngine(ScriptedEngine):
    """Tells how the loop turned while choices were begun, and how many it holds."""

    def __init__(self) -> None:
        super().__init__(says("ok"))
        self.num_turns = 0
        self.begun_in: list[tuple[int, int]] = []  # choices, and the turn

    def submit_choices(self, arrival: Arrival, n: int) -> list[ScriptedStream]:
        self.begun_in.append((n, self.num_turns))
        self.num_requests += n
        return super().submit_choices(arrival, n)


async def complete(engine: WatchedEngine, body: dict[str, Any], **server: Any) -> httpx.Response:
    """Send a request, and count the turns of the loop until it is answered."""

    async def count() -> None:
        while True:
            engine.num_turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    transport = httpx.ASGITransport(make_app(engine, **server), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.post("/v1/completions", json=body)
    counting.cancel()
    return answer


@pytest.mark.parametrize(("num_prompts", "n"), [(1, 300), (100, 3), (300, 1)])
def test_many_choices_are_begun_in_turns(num_prompts: int, n: int) -> None:
    """A bounded number in each; they draw as if they had been begun at once."""
    engine = WatchedEngine()
    body = {"prompt": ["x"] * num_prompts, "n": n, "seed": 7, "prompt_logprobs": 1}
    answer = asyncio.run(complete(engine, body))
    assert answer.status_code == 200
    assert len(answer.json()["choices"]) == 300
    begun: Counter[int] = Counter()
    for count, turn in engine.begun_in:
        begun[turn] += count
    assert len(begun) == 3
    assert max(begun.values()) < CHOICES_A_TURN + n
    seeds = [stream.params.seed for stream in engine.streams]
    assert seeds == [7 + index for index in range(n)] * num_prompts
    scored = [stream.params.prompt_logprobs is not None for stream in engine.streams]
    assert scored == [index == 0 for index in range(n)] * num_prompts


def test_others_may_take_the_last_places() -> None:
    """Between two turns: what was begun is aborted, and the client told to come again."""
    engine = WatchedEngine()

    def taken(_: ScriptedStream) -> list[Item]:
        engine.num_requests = 250
        return []

    engine.script = taken
    answer = asyncio.run(complete(engine, {"prompt": "x", "n": 250}, max_queued_requests=260))
    assert answer.status_code == 429
    assert len(engine.streams) == CHOICES_A_TURN
    assert all(stream.is_aborted for stream in engine.streams)
