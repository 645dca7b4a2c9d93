"""Messages that make a chat template loop, or take all memory: a live server goes on for others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.server.conftest import API_KEY, serving
from tests.server.test_attacks import MIB, Target

pytestmark = pytest.mark.processes

CHAT = "/v1/chat/completions"
TEMPLATE = (
    "{% set text = messages[-1].content %}"
    "{% if text == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}{% elif text == 'power' %}{{ 9 ** (9 ** 9) }}"
    "{% elif text == 'space' %}{{ 'x' * 2 ** 31 }}"
    "{% else %}<|user|>{{ text }}<|assistant|>{% endif %}"
)
ATTACKS = {"loop": "takes more than 1 s", "power": "takes more than 1 s", "space": "MemoryError"}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A server with a template that does what it is told."""
    file = tmp_path_factory.mktemp("template") / "template.jinja"
    file.write_text(TEMPLATE)
    with serving("--chat-template", str(file)) as (process, url):
        yield Target(process, url)


async def answers(url: str, *contents: str) -> list[httpx.Response]:
    """Return the answers to conversations that are sent at once."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=100) as client:
        bodies = [
            {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
            for content in contents
        ]
        return await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies))


def test_a_template_that_takes_too_much_is_a_400(target: Target) -> None:
    """In a bounded time, each in its turn; neighbours have their answers, and then all have."""
    with target.bounded(32 * MIB):
        began = time.monotonic()
        given = asyncio.run(answers(target.url, *ATTACKS))
        assert time.monotonic() - began < 60
    for answer, says in zip(given, ATTACKS.values(), strict=True):
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "messages"
        assert says in error["message"]
        assert "\n" not in error["message"]
    [calm] = asyncio.run(answers(target.url, "hello"))
    assert calm.status_code == 200
