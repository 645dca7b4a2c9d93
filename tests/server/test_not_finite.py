"""A model that computes no numbers for one request of a batch, behind a live server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.server.conftest import API_KEY, serving

POISON = 7  # its embedding is NaN
BLOCK = 16  # tokens of KV
HEADERS = {"Authorization": f"Bearer {API_KEY}"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server whose model knows no numbers for one of its ids."""
    path = tmp_path_factory.mktemp("model")
    model = make_checkpoint(path, "llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = torch.nan
    model.save_pretrained(path)
    with serving("--num-device-blocks", "64", "--block-size", str(BLOCK), model=str(path)) as (
        _,
        u,
    ):
        yield u


def body(first: int, **changes: Any) -> dict[str, Any]:
    """Return a request for a stream of 60 ids, none of them the one that would poison it."""
    return {
        "prompt": [first, *range(20, 60)], "max_tokens": 60, "ignore_eos": True, "stream": True,
        "return_token_ids": True, "logit_bias": {str(POISON): -100}, **changes,
    }  # fmt: skip


async def streamed(url: str, *bodies: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Send requests at once and return the events of each."""

    async def one(client: httpx.AsyncClient, asked: dict[str, Any]) -> list[dict[str, Any]]:
        answer = await client.post("/v1/completions", json=asked)
        assert answer.status_code == 200
        *events, end = [line for line in answer.text.split("\n\n") if line]
        assert end == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]

    async with httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=60) as client:
        return await asyncio.gather(*(one(client, asked) for asked in bodies))


def ids(events: list[dict[str, Any]]) -> list[int]:
    """Return the ids of a stream that ended well."""
    return [i for event in events for choice in event["choices"] for i in choice["token_ids"]]


@pytest.mark.processes
@pytest.mark.parametrize("draws", [{"temperature": 0}, {"temperature": 1, "seed": 3, "top_p": 0.9}])
def test_it_ends_with_an_error_and_harms_no_other(url: str, draws: dict[str, Any]) -> None:
    """In a stream as an event, else as a 500."""
    good = [body(first, **draws) for first in (10, 11, 12)]
    [alone] = asyncio.run(streamed(url, good[0]))
    bad = body(POISON, **draws)
    for _ in range(2):
        *others, failed = asyncio.run(streamed(url, *good, bad))
        assert ids(others[0]) == ids(alone)
        assert [len(ids(events)) for events in others] == [60, 60, 60]
        [event] = failed
        assert (event["error"]["type"], event["error"]["code"]) == ("server_error", "engine_error")
        assert "not finite" in event["error"]["message"]
    with httpx.Client(base_url=url, headers=HEADERS, timeout=60) as client:
        for more in ({}, {"logprobs": 2}, {"prompt_logprobs": 1}, {"n": 2}):
            asked = body(POISON, **draws, **more) | {"stream": False, "max_tokens": 5}
            answer = client.post("/v1/completions", json=asked)
            assert answer.status_code == 500, answer.text
            assert "not finite" in answer.json()["error"]["message"]
        assert client.get("/health").status_code == 200
        metrics = client.get("/metrics").text
    restarts = [line for line in metrics.splitlines() if "fastserve:engine_restarts_total{" in line]
    assert [line.rpartition(" ")[2] for line in restarts] == ["0.0"]
