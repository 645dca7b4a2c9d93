"""Engines over the demo model, alone and as clients see them, for tests of the composition root."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastserve.client.async_engine import AsyncEngine
from fastserve.client.streams import RequestStream
from fastserve.core.request import Arrival, FinishReason, SamplingParams
from fastserve.engine.engine import Engine
from fastserve.settings.engine import EngineConfig

T = TypeVar("T")
SMALL = EngineConfig(model="demo", num_device_blocks=32, num_threads=1)
PROMPT = [10, 20, 30, 40, 50]


def run(test: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine function with a time limit."""

    async def limited() -> T:
        async with asyncio.timeout(100):
            return await test()

    return asyncio.run(limited())


def generate(engine: Engine, params: SamplingParams) -> list[int]:
    """Run one request alone to its end."""
    engine.add(Arrival(PROMPT, params))
    ids: list[int] = []
    while engine.num_requests:
        ids += [sample.token_id for update in engine.step() for sample in update.samples]
    return ids


async def read(stream: RequestStream) -> tuple[list[int], FinishReason | None]:
    """Read a stream to its end."""
    ids: list[int] = []
    reason = None
    async for update in stream:
        ids += [sample.token_id for sample in update.samples]
        reason = update.finish_reason
    return ids, reason


def text_of(engine: AsyncEngine) -> str:
    """Return the metrics as text."""
    return engine.metrics.render()[0].decode()
