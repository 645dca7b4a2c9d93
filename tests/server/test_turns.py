"""Long work on the loop, in turns."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from fastserve.server.turns import Turns


def test_others_have_half_of_the_loop() -> None:
    """Between two pieces of long work there is as much time as one of them took."""
    spans: list[tuple[float, float]] = []

    def work() -> None:
        began = time.monotonic()
        while time.monotonic() < began + 0.02:
            pass
        spans.append((began, time.monotonic()))

    async def run() -> None:
        turns = Turns()
        await asyncio.gather(*(turns.run(work) for _ in range(4)))

    asyncio.run(run())
    assert len(spans) == 4
    for (began, ended), (began_next, _) in itertools.pairwise(spans):
        assert began_next - ended > 0.9 * (ended - began)


def test_a_failure_passes_the_turn_on() -> None:
    """And is the caller's."""

    async def run() -> str:
        turns = Turns()
        with pytest.raises(ZeroDivisionError):
            await turns.run(lambda: 1 // 0)
        return await turns.run(lambda: "next")

    assert asyncio.run(run()) == "next"
