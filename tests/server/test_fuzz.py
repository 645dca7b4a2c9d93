"""Nonsense of every kind against the live server: it is answered, and harms nobody."""

from __future__ import annotations

import random
import re
from typing import Any

import httpx
import pytest

from fastserve.server import protocol
from tests.server.conftest import API_KEY

pytestmark = pytest.mark.processes

ROUTES: dict[str, tuple[type[protocol.Body], dict[str, Any]]] = {
    "/v1/completions": (protocol.CompletionRequest, {"prompt": "x", "max_tokens": 2}),
    "/v1/chat/completions": (
        protocol.ChatCompletionRequest,
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    ),
    "/tokenize": (protocol.TokenizeRequest, {"prompt": "x"}),
    "/detokenize": (protocol.DetokenizeRequest, {"tokens": [5]}),
}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 20, 10**9, 2**63, -(2**63), 1.5, -0.5, 0.0, 1e300, 1e-300, "",
    "x", "1", "é😀", "\x00", [], [1], ["a"], [[1, 2], [3]], [None], {}, {"a": 1}, {"5": 1},
    {"300": -100}, {"self": 1}, [{}], [{"role": "user", "content": "x"}], {"include_usage": True},
    [{"role": "user", "content": [{"type": "text", "text": "q"}]}], list(range(3072)),
)  # fmt: skip
NUM_REQUESTS = 600


def test_nonsense_is_answered_and_harms_nobody(server_url: str) -> None:
    """Never a 5xx nor an error in a stream; refusals have OpenAI's shape; the engine lives on."""
    rng = random.Random(0)
    statuses = set()
    headers = {"Authorization": f"Bearer {API_KEY}"}
    with httpx.Client(base_url=server_url, headers=headers, timeout=60) as client:
        for _ in range(NUM_REQUESTS):
            path = rng.choice(list(ROUTES))
            model, plain = ROUTES[path]
            body = dict(plain)
            for name in rng.sample(sorted(model.model_fields), rng.choice((1, 1, 2))):
                body[name] = rng.choice(VALUES)
            if "max_tokens" in plain and body["max_tokens"] is None:
                body["max_tokens"] = 2  # not the whole window
            response = client.post(path, json=body)
            statuses.add(response.status_code)
            assert response.status_code in (200, 400, 404), (body, response.text)
            if response.status_code == 200:
                assert '"error"' not in response.text, (body, response.text)
            else:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert statuses >= {200, 400}
        exposition = client.get("/metrics").text
    assert re.search(r"^fastserve:engine_restarts_total{.*} 0\.0$", exposition, re.MULTILINE)
