"""What a request may ask for: judged before any of it is made, and made once where once will do."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.messages import RequestUpdate
from fastserve.core.request import FinishReason, Handle
from fastserve.server.price import Demand
from tests.server.scripted import (
    METRICS,
    Item,
    ScriptedEngine,
    ScriptedStream,
    entry,
    make_app,
    post,
    says,
    scored,
)

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "x"}]

demands = st.builds(
    Demand,
    num_prompts=st.integers(1, 50),
    n=st.integers(1, 2048),
    prompt_tokens=st.integers(1, 10**6),
    max_tokens=st.just(1),
    logprobs=st.integers(0, 20),
    prompt_logprobs=st.integers(0, 20),
)


def test_the_price_counts_every_token_and_every_score_of_every_choice() -> None:
    """By hand: 128 choices of 2,000 tokens, 20 alternatives to each, and 16 tokens of an answer."""
    demand = Demand(n=128, prompt_tokens=2000, max_tokens=16, prompt_logprobs=20)
    assert demand.price == 128 * (2000 * 21 + 16)
    assert str(demand) == (
        "n 128 × (prompt 2000 × (1 + prompt_logprobs 20) + max_tokens 16 × (1 + logprobs 0)) "
        "= 5378048"
    )


@given(demand=demands, price=st.integers(1, 10**9))
def test_what_is_affordable_is_the_longest_answer_within_the_price(
    demand: Demand, price: int
) -> None:
    """One token more would cost too much, and where nothing is affordable nothing was."""
    longest = demand.affordable_tokens(price)
    within = dataclasses.replace(demand, max_tokens=longest)
    beyond = dataclasses.replace(demand, max_tokens=longest + 1)
    assert within.price <= price < beyond.price


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": "x", "n": 64}, "n"),
        (COMPLETIONS, {"prompt": [5] * 60, "prompt_logprobs": 20, "max_tokens": 1}, None),
        (COMPLETIONS, {"prompt": [5] * 60, "logprobs": 20, "echo": True}, None),
        (COMPLETIONS, {"prompt": "x", "logprobs": 20, "max_tokens": 90}, "logprobs"),
        (COMPLETIONS, {"prompt": [[5] * 60] * 20, "max_tokens": 1}, "prompt"),
        (COMPLETIONS, {"prompt": ["x"] * 20, "max_tokens": 90}, "prompt"),
        (CHAT, {"messages": HELLO, "n": 12, "max_tokens": 90}, "n"),
    ],
)
def test_a_request_that_costs_too_much_is_refused(
    path: str, body: dict[str, Any], param: str | None
) -> None:
    """A 400 that names the field, the sum and the limit; nothing reaches the engine."""
    engine = ScriptedEngine()
    response = post(engine, path, body, max_request_price=1000)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == "request_too_expensive"
    assert error["param"] == (param or "prompt_logprobs")
    assert error["message"].endswith("one request may ask for at most 1000.")
    assert not engine.streams


def test_a_plain_request_may_fill_the_window_whatever_the_price() -> None:
    """One choice without scores is never too much."""
    engine = ScriptedEngine()
    for max_tokens in (50, None, 10**6):
        body = {"prompt": [5] * 50, "max_tokens": max_tokens}
        response = post(engine, COMPLETIONS, body, max_request_price=1)
        assert response.status_code == 200, response.text
        assert engine.streams[-1].params.max_tokens == 50
    response = post(engine, COMPLETIONS, {"prompt": [5] * 50, "n": 2}, max_request_price=1)
    assert response.status_code == 400


def test_a_limit_that_was_not_set_is_cut_to_the_price() -> None:
    """As it is cut to the window: nobody asked for so much. One that was set is refused."""
    engine = ScriptedEngine()
    body: dict[str, Any] = {"messages": HELLO, "n": 10}
    assert post(engine, CHAT, body, max_request_price=800).status_code == 200
    num_prompt_tokens = len(engine.streams[0].prompt_token_ids)
    limits = {stream.params.max_tokens for stream in engine.streams}
    assert limits == {80 - num_prompt_tokens}
    body["max_completion_tokens"] = 81 - num_prompt_tokens
    assert post(engine, CHAT, body, max_request_price=800).status_code == 400


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_prompt_goes_once_and_is_scored_once(is_stream: bool) -> None:
    """Three choices: one submission, of which the first brings the scores that all show."""
    engine = ScriptedEngine(says("ok"))
    body = {
        "prompt": ["the dog", "a cat"], "n": 3, "seed": 7, "prompt_logprobs": 2,
        "stream": is_stream,
    }  # fmt: skip
    response = post(engine, COMPLETIONS, body)
    assert engine.num_submissions == 2
    params = [stream.params for stream in engine.streams]
    assert [each.seed for each in params] == [7, 8, 9] * 2
    assert [each.prompt_logprobs for each in params] == [2, None, None] * 2
    if is_stream:
        lines = response.text.split("\n\n")[:-2]
        chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
        shown = {c["index"]: c["prompt_logprobs"] for c in chunks if "prompt_logprobs" in c}
    else:
        shown = {c["index"]: c["prompt_logprobs"] for c in response.json()["choices"]}
    assert sorted(shown) == list(range(6))
    for index, scores in shown.items():
        assert len(scores) == len(engine.streams[index].prompt_token_ids)
        assert scores == shown[index - index % 3]
    assert shown[0] != shown[3]


def test_a_choice_waits_for_the_scores_that_another_brings() -> None:
    """The second has ended before the first one's prompt is scored; nothing of it is lost."""
    is_submitted = asyncio.Event()

    def script(stream: ScriptedStream) -> list[Item]:
        is_submitted.set()
        return [] if stream.params.prompt_logprobs is not None else [*says("ok")(stream)]

    engine = ScriptedEngine(script)

    async def score_late() -> None:
        await is_submitted.wait()
        first, second = engine.streams
        num_updates = second.items.qsize()
        for _ in range(20):
            await asyncio.sleep(0)
        assert second.items.qsize() == num_updates > 0, "it is not read yet"
        scores = [entry(token_id, 1) for token_id in first.prompt_token_ids[1:]]
        first.items.put_nowait(RequestUpdate(Handle(0), (), prompt_logprobs=scores))
        end = RequestUpdate(Handle(0), [scored(first, 5)], FinishReason.LENGTH, None, METRICS)
        first.items.put_nowait(end)

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"prompt": "dog", "n": 2, "prompt_logprobs": 1}
            answering = asyncio.create_task(client.post(COMPLETIONS, json=body))
            async with asyncio.timeout(30):
                await score_late()
                return await answering

    choices = asyncio.run(run()).json()["choices"]
    assert choices[1]["text"] == "ok"
    assert choices[0]["prompt_logprobs"] == choices[1]["prompt_logprobs"]
    assert len(choices[0]["prompt_logprobs"]) == len(engine.streams[0].prompt_token_ids)
