"""Answers that take too long: given up with 504, and nothing of them is left running."""

from __future__ import annotations

import asyncio
import json
from math import inf
from typing import Any

import pytest

from fastserve.server.deadlines import TIMEOUT_HEADER, Deadline, seconds
from fastserve.server.errors import ApiError
from tests.server.scripted import ScriptedEngine, call, make_app, says

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "a"},
    CHAT: {"messages": [{"role": "user", "content": "a"}]},
}


def never_ends() -> ScriptedEngine:
    """Return an engine whose answers begin and do not end."""
    return ScriptedEngine(says("ab", ends=None))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("n", [1, 3])
def test_an_answer_that_takes_too_long_is_a_504(path, n):
    """By the server's limit; every choice is aborted."""
    engine = never_ends()
    app = make_app(engine, request_timeout=0.05)
    answer = call(app, "POST", path, json={**BODIES[path], "n": n})
    assert answer.status_code == 504
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "request_timeout")
    assert "0.05 s" in error["message"]
    assert len(engine.streams) == n
    assert all(stream.is_aborted for stream in engine.streams)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("grace", [0.0, 1.0])
def test_a_stream_that_takes_too_long_ends_with_an_error_event(path, grace):
    """What was said comes first, [DONE] last; also where the stream could be resumed."""
    engine = never_ends()
    app = make_app(engine, stream_grace=grace)
    headers = {TIMEOUT_HEADER: "0.05"}
    answer = call(app, "POST", path, json={**BODIES[path], "stream": True}, headers=headers)
    assert answer.status_code == 200
    *events, done = [
        line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data")
    ]
    assert done == "[DONE]"
    assert "a" in events[-2]
    assert json.loads(events[-1])["error"]["code"] == "request_timeout"
    assert engine.streams[0].is_aborted


@pytest.mark.parametrize("header", [None, "60"])
def test_a_client_cannot_ask_for_more_time_than_there_is(header):
    """The smaller of both counts."""
    app = make_app(never_ends(), request_timeout=0.05)
    headers = {} if header is None else {TIMEOUT_HEADER: header}
    answer = call(app, "POST", COMPLETIONS, json=BODIES[COMPLETIONS], headers=headers)
    assert "0.05 s" in answer.json()["error"]["message"]


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "nan", "inf", "1e999"])
def test_a_header_that_says_no_time_is_refused(text):
    """With its name, and before anything runs."""
    engine = never_ends()
    headers = {TIMEOUT_HEADER: text}
    answer = call(make_app(engine), "POST", COMPLETIONS, json=BODIES[COMPLETIONS], headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == TIMEOUT_HEADER
    assert engine.num_submissions == 0
    with pytest.raises(ApiError):
        seconds(text)


def test_an_answer_in_time_is_left_alone():
    """With a deadline and without, it is the same."""
    answers = [
        call(make_app(ScriptedEngine(says("fox")), request_timeout=limit), "POST", COMPLETIONS,
             json=BODIES[COMPLETIONS]).json()["choices"]
        for limit in (None, 60.0)
    ]  # fmt: skip
    assert answers[0] == answers[1]
    assert answers[0][0]["text"]


def test_the_time_out_of_what_is_waited_for_stays_its_own():
    """Only the deadline's is a 504."""

    async def fails() -> None:
        raise TimeoutError("another one")

    async def run() -> None:
        at = asyncio.get_running_loop().time() + 60
        for deadline in (Deadline(60, at), Deadline(inf, inf)):
            with pytest.raises(TimeoutError, match="another one"):
                await deadline.wait(fails())

    asyncio.run(run())
