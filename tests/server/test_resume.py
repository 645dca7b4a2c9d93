"""Disturbed answers are the undisturbed ones: blocks that run out, an engine that is killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from benchmarks.process_cpu import engine_of
from tests.server.conftest import API_KEY, serving

pytestmark = [pytest.mark.processes, pytest.mark.no_cover]

NUM_REQUESTS = 8
KILL_AFTER = 200  # events of all streams


def bodies() -> list[dict[str, Any]]:
    """Return requests of all kinds: greedy, drawn from everything, filtered, penalised, scored."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1, "top_p": 1, "seed": 11},
        {"temperature": 1, "top_p": 0.9, "top_k": 50, "seed": 12, "presence_penalty": 0.5},
        {"temperature": 1, "top_p": 1, "seed": 13, "repetition_penalty": 1.1, "logprobs": 2},
    ]
    return [
        {
            "prompt": f"Number {i}: the for statement and lists " * (1 + i % 3),
            "max_tokens": 90 + 10 * i,
            "ignore_eos": True,
            "stream": True,
            **kinds[i % len(kinds)],
        }
        for i in range(NUM_REQUESTS)
    ]


async def answers(url: str, on_event: Callable[[int], None]) -> list[str]:
    """Run all requests at once and return their texts; `on_event` gets the count of events."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    count = 0

    async def answer(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        nonlocal count
        text = ""
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                    count += 1
                    on_event(count)
        return text

    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
        return await asyncio.gather(*(answer(client, body) for body in bodies()))


def total(url: str, name: str) -> float:
    """Return a counter of a server."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    exposition = httpx.get(url + "/metrics", headers=headers).text
    found = re.search(rf"^fastserve:{name}_total{{.*}} (\S+)$", exposition, re.MULTILINE)
    assert found, exposition
    return float(found.group(1))


def test_disturbed_answers_are_the_undisturbed_ones(server_url: str) -> None:
    """Over HTTP, in a pool too small for all, with the engine killed in mid-stream."""
    undisturbed = asyncio.run(answers(server_url, lambda count: None))
    assert total(server_url, "recomputed_tokens") == 0
    pressed = ("--num-device-blocks", "30", "--max-num-batched-tokens", "64")
    with serving(*pressed, "--preemption-mode", "recompute") as (process, url):

        def kill_engine(count: int) -> None:
            if count == KILL_AFTER:
                os.kill(engine_of(process.pid), signal.SIGKILL)

        assert asyncio.run(answers(url, kill_engine)) == undisturbed
        assert total(url, "engine_restarts") == 1
        assert total(url, "num_preemptions") > 0
        assert total(url, "recomputed_tokens") > 0
