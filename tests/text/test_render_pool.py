"""Templates that do harm harm nobody: they are rendered in processes that can be killed."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import fastserve
from fastserve.text.chat_renderer import ChatRenderer
from fastserve.text.chat_template import ChatTemplateError
from fastserve.text.render_pool import MAX_PROCESSES, RenderPool
from tests.tiny_tokenizers import CHAT_TEMPLATE

COMMAND = (sys.executable, "-P", "-m", "fastserve.text.render_process")
ENVIRONMENT = {"PYTHONPATH": str(Path(fastserve.__file__).parent.parent)}
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
# What it does is in the last message.
DOES = "{% set words = messages[-1].content.split() %}"
LOOPS = DOES + (
    "{% if words[0] == 'loop' %}"
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{% elif words[0] == 'power' %}{{ 9 ** (9 ** 9) }}"
    "{% elif words[0] == 'space' %}{{ 'x' * 2 ** 31 }}"
    "{% elif words[0] == 'long' %}{{ 'x' * (2 ** 24 + 1) }}"
    "{% elif words[0] == 'refuse' %}{{ raise_exception('not\\nthis') }}"
    "{% else %}{{ messages[-1].content }}{% endif %}"
)


@asynccontextmanager
async def pool_of(source: str, **limits: float) -> AsyncIterator[RenderPool]:
    """Open a pool, and end it."""
    pool = RenderPool(source, NAMES, COMMAND, ENVIRONMENT, **{"cpu_limit_s": 0.3, **limits})
    await pool.start()
    try:
        yield pool
    finally:
        await pool.close()


async def render(pool: RenderPool, content: str, **changes: Any) -> str:
    """Render a message of a user."""
    options: dict[str, Any] = {
        "add_generation_prompt": True, "continue_final_message": False, "variables": {},
    }  # fmt: skip
    return await pool.render([{"role": "user", "content": content}], **options | changes)


def pids(pool: RenderPool) -> list[int]:
    """Return the processes that wait for work."""
    return [process.popen.pid for process in pool._idle]


@pytest.mark.processes
def test_a_prompt_is_the_one_that_is_made_here() -> None:
    """Options and variables arrive, whatever JSON can hold."""
    messages = [{"role": "user", "content": "é \U0001f600"}, {"role": "assistant", "content": "a "}]
    variables = {"mood": [10**30, None, {"x": 1.5}]}
    source = CHAT_TEMPLATE + "{{ mood }}"

    async def run() -> tuple[str, str]:
        async with pool_of(source) as pool:
            first = await pool.render(
                messages, add_generation_prompt=True, continue_final_message=False,
                variables=variables,
            )  # fmt: skip
            second = await pool.render(
                messages, add_generation_prompt=False, continue_final_message=True, variables={}
            )
            return first, second

    here = ChatRenderer(source, NAMES)
    assert asyncio.run(run()) == (
        here.render(messages, variables=variables),
        here.render(messages, add_generation_prompt=False, continue_final_message=True),
    )


@pytest.mark.processes
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("loop", "takes more than 0.3 s"), ("power", "takes more than 0.3 s"),
        ("space", "failed: MemoryError"), ("long", "makes a prompt of 16777217 characters"),
        ("refuse", "failed: not this"),
    ],
)  # fmt: skip
def test_what_does_harm_is_refused_in_one_line(content: str, says: str) -> None:
    """In bounded time, also where one operation takes it all; the next one is rendered."""

    async def run() -> str:
        async with pool_of(LOOPS) as pool:
            began = time.monotonic()
            with pytest.raises(ChatTemplateError, match=f"^[^\n]*{says}[^\n]*$"):
                await render(pool, content)
            assert time.monotonic() - began < 20
            return await render(pool, "hello")

    assert asyncio.run(run()) == "hello"


@pytest.mark.processes
def test_others_are_rendered_and_the_loop_turns_meanwhile() -> None:
    """While one conversation loops until its time is up, the other process and this one work."""

    async def run() -> tuple[float, int]:
        async with pool_of(LOOPS) as pool:
            looping = asyncio.create_task(render(pool, "loop"))
            await render(pool, "first")  # its process is there now
            longest, count = 0.0, 0
            while not looping.done():
                began = time.monotonic()
                assert await render(pool, "x") == "x"
                longest, count = max(longest, time.monotonic() - began), count + 1
                await asyncio.sleep(0)
            with pytest.raises(ChatTemplateError):
                await looping
            return longest, count

    longest, count = asyncio.run(run())
    assert count > 10
    assert longest < 1.0


@pytest.mark.processes
def test_one_that_stands_still_is_killed_too() -> None:
    """Time that it does not use counts after a longer while."""

    async def run() -> None:
        async with pool_of(LOOPS, cpu_limit_s=60, wall_limit_s=2) as pool:
            with pytest.raises(ChatTemplateError, match=r"more than 2 s"):
                await render(pool, "loop")
            assert await render(pool, "x") == "x"

    asyncio.run(run())


@pytest.mark.processes
def test_a_caller_that_leaves_takes_its_process_along() -> None:
    """What it was at is of no use; the others' places are free again."""

    async def run() -> None:
        async with pool_of(LOOPS, cpu_limit_s=60) as pool:
            gone = pids(pool)
            for _ in range(MAX_PROCESSES + 1):
                task = asyncio.create_task(render(pool, "loop"))
                await asyncio.wait((task,), timeout=0.1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert await render(pool, "x") == "x"
            await asyncio.gather(*pool._reaping)
            assert not set(gone) & set(pids(pool))
            for pid in gone:
                with pytest.raises(ProcessLookupError):
                    os.kill(pid, 0)

    asyncio.run(run())


@pytest.mark.processes
def test_nothing_is_left_running() -> None:
    """A closed pool has no process; one that dies unasked, or over a conversation, is replaced."""

    async def run() -> list[int]:
        async with pool_of(LOOPS) as pool:
            [killed] = pids(pool)
            os.kill(killed, 9)
            while pool._idle[0].popen.poll() is None:
                await asyncio.sleep(0.01)
            assert await render(pool, "x") == "x"
            [busy] = pids(pool)
            task = asyncio.create_task(render(pool, "loop"))
            await asyncio.sleep(0)
            os.kill(busy, 9)
            with pytest.raises(ChatTemplateError, match="cannot be rendered"):
                await task
            assert await render(pool, "x") == "x"
            return [killed, busy, *pids(pool)]

    for pid in asyncio.run(run()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.processes
def test_a_template_learns_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what it is given is there: no keys."""
    monkeypatch.setenv("FASTSERVE_API_KEY", "secret")

    async def run() -> bytes:
        async with pool_of(LOOPS) as pool:
            await render(pool, "x")
            return Path(f"/proc/{pids(pool)[0]}/environ").read_bytes()

    if not Path("/proc/self/environ").exists():
        pytest.skip("no /proc")
    assert b"secret" not in asyncio.run(run())
