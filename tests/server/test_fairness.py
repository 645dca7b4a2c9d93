"""Two API keys over HTTP, one of which floods: the other is answered as if that were not there."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest

from tests.server.conftest import API_KEY, OTHER_KEY, serving

pytestmark = pytest.mark.processes

NUM_FLOOD, FLOOD_TOKENS = 48, 300
KEY = {"Authorization": f"Bearer {API_KEY}"}
NUM_QUIET, QUIET_TOKENS = 6, 24


async def complete(client: httpx.AsyncClient, key: str, max_tokens: int, number: int) -> float:
    """Ask for an answer of so many tokens; return the seconds that it took."""
    body: dict[str, Any] = {
        "prompt": [5 + number, 6, 7], "max_tokens": max_tokens, "ignore_eos": True, "seed": number,
    }  # fmt: skip
    began = time.monotonic()
    headers = {"Authorization": f"Bearer {key}"}
    response = await client.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == max_tokens
    return time.monotonic() - began


async def quiet_jcts(client: httpx.AsyncClient) -> list[float]:
    """Ask one after the other, with the key that does not flood."""
    return [await complete(client, OTHER_KEY, QUIET_TOKENS, n) for n in range(NUM_QUIET)]


async def beside_a_flood(url: str) -> tuple[float, float, int]:
    """Return the quiet key's mean, alone and beside the flood, and how much of that was left."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await quiet_jcts(client)  # what a server does once it has done
        alone = await quiet_jcts(client)
        flood = [
            asyncio.create_task(complete(client, API_KEY, FLOOD_TOKENS, 100 + number))
            for number in range(NUM_FLOOD)
        ]
        while True:  # until all of it is there
            exposition = (await client.get("/metrics", headers=KEY)).text
            waiting = [line for line in exposition.splitlines() if "num_requests_waiting{" in line]
            if float(waiting[0].split()[-1]) > NUM_FLOOD / 2:
                break
        beside = await quiet_jcts(client)
        num_left = sum(not task.done() for task in flood)
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
    return sum(alone) / NUM_QUIET, sum(beside) / NUM_QUIET, num_left


@pytest.mark.parametrize("fairness", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_key_that_floods_does_not_hold_up_another(fairness: bool) -> None:
    """With fair shares most of the flood is still there when the quiet key has been answered.

    Without them the quiet key waits for it.
    """
    flags = ["--api-key", API_KEY, OTHER_KEY, "--max-num-seqs", "4", "--boost", "0"]
    with serving(*flags, *(["--fairness"] if fairness else [])) as (_, url):
        alone_s, beside_s, num_left = asyncio.run(beside_a_flood(url))
    print(f"alone {alone_s:.3f} s, beside a flood {beside_s:.3f} s, {num_left} left")  # noqa: T201
    assert (num_left > NUM_FLOOD / 2) == fairness
