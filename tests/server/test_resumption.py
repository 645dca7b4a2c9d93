"""A client that lost its stream and comes back gets the rest: no gap, no repeat, nobody else's."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fastapi import FastAPI

from fastserve.client.interfaces import EngineDeadError
from fastserve.core.messages import RequestFailedError, RequestUpdate
from fastserve.core.request import FinishReason, Handle
from fastserve.server.replay import MAX_STREAM_EVENTS, ReplayLimits
from fastserve.server.resumption import ResumableStreams
from tests.server.scripted import (
    METRICS,
    ScriptedEngine,
    ScriptedStream,
    call,
    fails,
    make_app,
    post,
    says,
    scored,
)

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASKED: dict[str, Any] = {"prompt": "The", "stream": True}
CHATTED = {"messages": [{"role": "user", "content": "x"}], "stream": True}
LONG_S = 600.0
SOON_S = 0.01
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": (COMPLETIONS, ASKED),
    "two prompts, two choices": (COMPLETIONS, {**ASKED, "prompt": ["a", "b"], "n": 2}),
    "usage": (COMPLETIONS, {**ASKED, "stream_options": {"include_usage": True}}),
    "echo": (COMPLETIONS, {**ASKED, "echo": True, "logprobs": 2}),
    "chat": (CHAT, {**CHATTED, "n": 2, "logprobs": True, "top_logprobs": 2}),
}


class Connection:
    """One request of an app, which reads what is answered and can be cut at any time."""

    def __init__(
        self,
        app: FastAPI,
        body: dict[str, Any],
        last_event_id: str | None = None,
        path: str = COMPLETIONS,
        key: str = "key",
    ) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.received = b""
        self._changed = asyncio.Event()
        self._cut = asyncio.Event()
        self._incoming = [
            {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        ]
        headers = [
            (b"content-type", b"application/json"),
            (b"authorization", b"Bearer " + key.encode()),
        ]
        if last_event_id is not None:
            headers.append((b"last-event-id", last_event_id.encode()))
        scope = {
            "type": "http", "method": "POST", "path": path, "query_string": b"",
            "headers": headers, "http_version": "1.1", "scheme": "http", "root_path": "",
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._receive, self._send))  # type: ignore[arg-type]

    async def _receive(self) -> dict[str, Any]:
        if self._incoming:
            return self._incoming.pop()
        await self._cut.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        self.received += message.get("body", b"")
        self._changed.set()

    async def until(self, is_enough: Callable[[Connection], bool]) -> None:
        """Read until what was received is enough."""
        while not is_enough(self):
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), 20)

    async def cut(self) -> None:
        """Lose the connection."""
        self._cut.set()
        await self.task

    async def end(self) -> bytes:
        """Read to the end of the answer."""
        await asyncio.wait_for(self.task, 20)
        return self.received

    @property
    def error(self) -> dict[str, Any]:
        """What the answer says is wrong."""
        return json.loads(self.received)["error"]


def app_over(
    engine: ScriptedEngine, grace_s: float = LONG_S, *, max_events: int = MAX_STREAM_EVENTS
) -> FastAPI:
    """Return an app whose streams can be resumed, each with so many events held."""
    app = make_app(engine, stream_grace=grace_s, api_key=("key", "other"))
    limits = ReplayLimits(grace_s, 2**20, max_stream_events=max_events)
    app.state.context.resumable = ResumableStreams(limits)
    return app


def whole_part(received: bytes) -> bytes:
    """Return what a client makes use of: events that arrived whole."""
    return received[: received.rfind(b"\n\n") + 2] if b"\n\n" in received else b""


def last_id(connection: Connection, received: bytes) -> str:
    """Return the id that a client resumes with."""
    ids = re.findall(rb"^id: (\S+)$", whole_part(received), re.MULTILINE)
    return ids[-1].decode() if ids else connection.headers["last-event-id"]


def numbers_of(received: bytes) -> list[int]:
    """Return the numbers of events."""
    return [int(n) for n in re.findall(rb"^id: [\w-]{22}:(\d+)$", received, re.MULTILINE)]


def without_names(received: bytes) -> bytes:
    """Return events as they are without the grace, whenever they were made."""
    without_ids = re.sub(rb"^id: \S+\n", b"", received, flags=re.MULTILINE)
    return re.sub(rb'"created":\d+|"id":"[^"]+"', b"", without_ids)


def run(work: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine; nothing it began may be left."""

    async def alone() -> None:
        await work()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others

    asyncio.run(alone())


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_all_that_is_added(kind):
    """And without the grace nothing is: no id, no header; the same events."""
    path, body = KINDS[kind]
    plain = post(ScriptedEngine(says("fox jumps")), path, body)
    assert b"id: " not in plain.content
    assert "last-event-id" not in plain.headers

    async def work() -> None:
        connection = Connection(app_over(ScriptedEngine(says("fox jumps"))), body, path=path)
        received = await connection.end()
        assert numbers_of(received) == list(range(1, 1 + received.count(b"\n\n")))
        assert without_names(received) == without_names(plain.content)

    run(work)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_cut_at_any_byte_goes_on_from_there(kind):
    """Every prefix of it, with the rest, is the stream: whole events of both, byte for byte."""
    path, body = KINDS[kind]

    async def work() -> None:
        app = app_over(ScriptedEngine(says("fox")))
        first = Connection(app, body, path=path)
        stream = await first.end()
        for length in range(len(stream)):
            event_id = last_id(first, stream[:length])
            rest = Connection(app, body, event_id, path)
            assert whole_part(stream[:length]) + await rest.end() == stream
            assert rest.headers["last-event-id"] == event_id
            assert rest.headers["content-type"].startswith("text/event-stream")
        num_prompts = 2 if isinstance(body.get("prompt"), list) else 1
        assert len(app.state.context.engine.streams) == body.get("n", 1) * num_prompts

    run(work)


def say(stream: ScriptedStream, token_id: int, *, is_last: bool = False) -> None:
    """Let a request's next token come."""
    reason = FinishReason.LENGTH if is_last else None
    metrics = METRICS if is_last else None
    update = RequestUpdate(Handle(0), [scored(stream, token_id)], reason, None, metrics)
    stream.items.put_nowait(update)


def has_events(count: int) -> Callable[[Connection], bool]:
    """Whether so many events have come."""
    return lambda connection: connection.received.count(b"\n\n") >= count


def test_a_request_goes_on_without_its_client():
    """What it says meanwhile is there when the client is, also while an engine is replaced."""
    engine = ScriptedEngine(says("ab", ends=None))

    async def work() -> None:
        app = app_over(engine)
        first = Connection(app, ASKED)
        await first.until(has_events(2))
        await first.cut()
        [stream] = engine.streams
        say(stream, 5)
        engine.is_ready = False  # new requests are refused; those under way go on
        refused = Connection(app, ASKED)
        await refused.end()
        assert (refused.status, refused.error["code"]) == (503, "loading")
        second = Connection(app, ASKED, last_id(first, first.received))
        await second.until(has_events(1))
        await second.cut()
        third = Connection(app, ASKED, last_id(second, second.received))  # has all there is so far
        await third.until(lambda connection: connection.status == 200)
        say(stream, 6, is_last=True)
        received = first.received + second.received + await third.end()
        assert re.findall(rb"^id: \S+:(\d+)$", received, re.MULTILINE) == [
            b"%d" % n for n in range(1, 6)
        ]
        assert received.endswith(b"data: [DONE]\n\n")
        assert not stream.is_aborted
        await Connection(app, ASKED, last_id(first, b"")).end()

    run(work)


def test_a_choice_that_fails_ends_the_others():
    """As in any stream."""
    scripts = iter((fails("a", RequestFailedError("no")), says("ab", ends=None)))
    engine = ScriptedEngine(lambda stream: next(scripts)(stream))

    async def work() -> None:
        received = await Connection(app_over(engine), {**ASKED, "n": 2}).end()
        assert b'"error"' in received
        assert [stream.is_aborted for stream in engine.streams] == [False, True]

    run(work)


def test_events_that_come_together_may_be_more_than_are_held():
    """Usage and [DONE], where one event is held and the reader waits: it is given both."""
    engine = ScriptedEngine(says("ab", ends=None))
    body = {**ASKED, "stream_options": {"include_usage": True}}

    async def work() -> None:
        connection = Connection(app_over(engine, max_events=1), body)
        await connection.until(has_events(2))
        say(engine.streams[0], 5, is_last=True)
        assert (await connection.end()).endswith(b"data: [DONE]\n\n")
        assert numbers_of(connection.received) == [1, 2, 3, 4, 5]

    run(work)


@pytest.mark.parametrize("n", [1, 3])
def test_nobody_comes_back(n):
    """After the grace the requests are aborted, and nothing of the stream is left."""
    engine = ScriptedEngine(says("ab", ends=None))

    async def work() -> None:
        app = app_over(engine, SOON_S)
        body = {**ASKED, "n": n}
        first = Connection(app, body)
        await first.until(has_events(1))
        await first.cut()
        for stream in engine.streams:
            await asyncio.wait_for(stream.aborted.wait(), 20)
        late = Connection(app, body, last_id(first, first.received))
        await late.end()
        assert (late.status, late.error["code"]) == (404, "stream_not_found")
        assert len(app.state.context.resumable) == 0

    run(work)
    assert len(engine.streams) == n


def test_an_ended_stream_is_kept_for_the_grace():
    """Its end may have been lost; whoever has got it is told that there is no more."""

    async def work() -> None:
        app = app_over(ScriptedEngine(says("fox")))
        first = Connection(app, ASKED)
        stream = await first.end()
        again = Connection(app, ASKED, last_id(first, stream[:-10]))
        assert await again.end() == stream[stream.rindex(b"id: ") :]
        nothing = Connection(app, ASKED, last_id(first, stream))
        assert await nothing.end() == b""
        assert nothing.status == 204
        assert len(app.state.context.resumable) == 1

    run(work)


def test_the_later_of_two_readers_is_served():
    """The earlier one is told, in OpenAI's shape, and its connection ends."""
    engine = ScriptedEngine(says("ab", ends=None))

    async def work() -> None:
        app = app_over(engine)
        earlier = Connection(app, ASKED)
        await earlier.until(has_events(2))
        later = Connection(app, ASKED, last_id(earlier, b""))
        told = await earlier.end()
        say(engine.streams[0], 5, is_last=True)
        received = await later.end()
        seen, _, error = told.partition(b'data: {"error"')
        assert received.startswith(seen)
        assert (
            json.loads(b'{"error"' + error.partition(b"\n")[0])["error"]["code"]
            == "stream_taken_over"
        )
        assert told.endswith(b"data: [DONE]\n\n")
        assert b"error" not in received
        assert received.count(b"\n\n") == 4

    run(work)


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"key": "other"}, 404, "stream_not_found"),
        ({"body": {**ASKED, "seed": 1}}, 409, "stream_mismatch"),
        ({"path": CHAT}, 409, "stream_mismatch"),
        ({"last_event_id": "{name}:9999"}, 400, None),
        ({"last_event_id": "{name}"}, 404, "stream_not_found"),
        ({"last_event_id": "{name}:-1"}, 404, "stream_not_found"),
        ({"last_event_id": "{name}:" + "9" * 5000}, 404, "stream_not_found"),
        ({"last_event_id": "x" * 22 + ":1"}, 404, "stream_not_found"),
        ({"last_event_id": "1"}, 404, "stream_not_found"),
        ({"key": "wrong"}, 401, "invalid_api_key"),
    ],
)
def test_nobody_else_goes_on_with_a_stream(change, status, code):
    """Another key learns nothing of it; refusals name the header, and harm its reader in no way."""
    engine = ScriptedEngine(says("ab", ends=None))

    async def work() -> None:
        app = app_over(engine)
        owner = Connection(app, ASKED)
        await owner.until(has_events(2))
        event_id = last_id(owner, owner.received)
        asked = {"body": ASKED, "last_event_id": event_id, **change}
        asked["last_event_id"] = asked["last_event_id"].replace(
            "{name}", event_id.partition(":")[0]
        )
        other = Connection(app, **asked)
        await other.end()
        assert (other.status, other.error["code"]) == (status, code)
        assert other.error["param"] == (None if status == 401 else "Last-Event-ID")
        say(engine.streams[0], 5, is_last=True)
        assert (await owner.end()).count(b"\n\n") == 4

    run(work)
    assert len(engine.streams) == 1


def test_an_event_that_has_left_the_window():
    """410, for a client that comes back too far behind."""

    async def work() -> None:
        app = app_over(ScriptedEngine(says("foxes")), max_events=2)
        first = Connection(app, ASKED)
        *_, last = numbers_of(await first.end())
        for number, status in ((last - 3, 410), (last - 2, 200)):
            event_id = last_id(first, b"").replace(":0", f":{number}")
            late = Connection(app, ASKED, event_id)
            await late.end()
            assert late.status == status
            assert status == 200 or late.error["code"] == "event_gone"

    run(work)


def test_what_nobody_reads_stops_to_be_written():
    """At the bound of what is held; whoever comes back still gets all of it."""
    engine = ScriptedEngine(says("ab", ends=None))

    async def work() -> None:
        app = app_over(engine, max_events=2)
        first = Connection(app, ASKED)
        await first.until(has_events(2))
        await first.cut()
        [stream] = engine.streams
        for token_id in range(5, 25):
            say(stream, token_id, is_last=token_id == 24)
        other = Connection(app, ASKED)  # its answer comes after the writer has had its chance
        await other.until(has_events(2))
        assert stream.items.qsize() == 17  # two are held, one is in the hand of the writer
        second = Connection(app, ASKED, last_id(first, first.received))
        received = first.received + await second.end()
        assert numbers_of(received) == list(range(1, 24))
        engine.streams[1].finish(2)
        await other.end()

    run(work)


def test_an_engine_that_fails_is_told_to_who_comes_back():
    """The error is an event like any other."""
    engine = ScriptedEngine(fails("ab", EngineDeadError("no memory")))

    async def work() -> None:
        app = app_over(engine)
        first = Connection(app, ASKED)
        stream = await first.end()
        at = stream.rindex(b"id: ", 0, stream.index(b'"error"'))
        again = Connection(app, ASKED, last_id(first, stream[:at]))
        assert await again.end() == stream[at:]

    run(work)


def test_without_the_grace_the_header_is_not_read():
    """As ever."""
    engine = ScriptedEngine(says("fox"))

    async def work() -> None:
        connection = Connection(make_app(engine), ASKED, "anything:1")
        await connection.end()
        assert connection.status == 200

    run(work)


def test_pages_may_read_the_id():
    """Where pages of other origins are let in at all."""
    headers = {"Origin": "https://page.example"}
    for grace, is_exposed in ((0, False), (5, True)):
        app = make_app(ScriptedEngine(), stream_grace=grace, allowed_origins=("*",))
        answer = call(app, "POST", COMPLETIONS, json={"prompt": "x"}, headers=headers)
        assert ("Last-Event-ID" in answer.headers["access-control-expose-headers"]) is is_exposed


def test_the_description_says_so():
    """Header, statuses and metrics, where the grace is not 0."""
    for grace in (0, 5):
        app = make_app(ScriptedEngine(), stream_grace=grace)
        shown = call(app, "GET", "/metrics").text
        assert ("fastserve:resumable_streams{" in shown) is (grace > 0)
        paths = call(app, "GET", "/openapi.json").json()["paths"]
        for path, methods in paths.items():
            for operation in methods.values():
                has_it = grace > 0 and path in (COMPLETIONS, CHAT)
                assert ("410" in operation["responses"]) is has_it
                assert ("Last-Event-ID" in str(operation.get("parameters"))) is has_it
