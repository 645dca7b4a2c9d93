"""Work on long texts: few threads, a bounded queue, and nothing is kept for those who leave."""

from __future__ import annotations

import asyncio
import threading

import pytest

from fastserve.server.errors import ApiError
from fastserve.server.text_pool import HUGE_TEXT, LONG_TEXT, TextPool


async def begin(
    pool: TextPool,
    gate: threading.Event,
    began: list[int],
    number: int = 0,
    num_chars: int = LONG_TEXT,
):
    """Run work that waits at a gate."""

    def work() -> int:
        began.append(number)
        assert gate.wait(30)
        return number

    return await pool.run(num_chars, work)


async def until(condition) -> None:
    """Let others run until a condition holds."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


def test_short_work_is_done_at_once() -> None:
    """Whatever else waits."""
    pool = TextPool(max_chars=0)
    assert asyncio.run(pool.run(LONG_TEXT - 1, threading.get_ident)) == threading.get_ident()


def test_more_than_the_bound_is_refused() -> None:
    """503 at once; what was taken is done, and then there is room again."""

    async def run() -> None:
        began: list[int] = []
        pool, gate = TextPool(1, 3 * LONG_TEXT), threading.Event()
        tasks = [asyncio.create_task(begin(pool, gate, began, i)) for i in range(3)]
        await until(lambda: began)
        with pytest.raises(ApiError) as refused:
            await begin(pool, gate, began)
        assert refused.value.status_code == 503
        gate.set()
        assert await asyncio.gather(*tasks) == [0, 1, 2]
        await until(lambda: pool.num_chars == 0)
        assert await begin(pool, gate, began, 5) == 5

    asyncio.run(run())


def test_who_leaves_the_queue_is_not_worked_for() -> None:
    """Nor counted; what has begun keeps its thread until it ends."""

    async def run() -> None:
        began: list[int] = []
        pool, gate = TextPool(1, 10 * LONG_TEXT), threading.Event()
        tasks = [asyncio.create_task(begin(pool, gate, began, i)) for i in range(3)]
        await until(lambda: began)
        tasks[0].cancel()
        tasks[1].cancel()
        await asyncio.wait(tasks[:2])
        assert pool.num_chars == 2 * LONG_TEXT  # what runs, and the third
        assert began == [0]
        gate.set()
        assert await tasks[2] == 2
        assert began == [0, 2]
        await until(lambda: pool.num_chars == 0)

    asyncio.run(run())


def test_one_huge_text_at_a_time() -> None:
    """Long ones do not wait for it; who leaves while waiting takes nothing along."""

    async def run() -> None:
        began: list[int] = []
        pool, gate = TextPool(1), threading.Event()
        huge = [
            asyncio.create_task(begin(pool, gate, began, number, HUGE_TEXT)) for number in range(3)
        ]
        await until(lambda: began == [0])
        long = asyncio.create_task(begin(pool, gate, began, 3))
        await until(lambda: began == [0, 3])
        huge[1].cancel()
        await asyncio.wait(huge[1:2])
        assert began == [0, 3]
        gate.set()
        assert [await one for one in (huge[0], huge[2], long)] == [0, 2, 3]
        await until(lambda: pool.num_chars == 0)

    asyncio.run(run())
