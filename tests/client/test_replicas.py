"""Two engine processes behind one API process: a death, a silence, and who gets what after it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fastserve.client.async_engine import AsyncEngine, replica_config
from fastserve.client.interfaces import EngineDeadError
from fastserve.client.supervisor import Supervisor
from fastserve.core.messages import RequestFailedError
from fastserve.core.request import Arrival, FinishReason
from fastserve.settings.engine import EngineConfig
from fastserve.settings.server import ENGINE_TIMEOUT_S
from tests.client.test_async_engine import (
    COMMAND,
    expected,
    params,
    read,
    read_at_least,
    run,
)
from tests.engine.engine_process import POISON

pytestmark = pytest.mark.processes

NUM_STREAMS = 100


@asynccontextmanager
async def running(
    model: str = "paced", engine_timeout_s: float = ENGINE_TIMEOUT_S
) -> AsyncIterator[AsyncEngine]:
    """Yield two engines that both serve, and are closed in the end."""
    config = EngineConfig(model=model, scheduling_policy="fcfs", data_parallel_size=2)
    engine = AsyncEngine(config, COMMAND, engine_timeout_s=engine_timeout_s)
    await engine.start()
    try:
        await asyncio.gather(*(replica.ready() for replica in engine.replicas))
        yield engine
    finally:
        await engine.close()


def num_given(replica: Supervisor) -> int:
    """Return how many requests the process of a replica has."""
    assert replica.link is not None
    return len(replica.link._given)


def figure(engine: AsyncEngine, name: str) -> float:
    """Return one exported figure."""
    lines = engine.metrics.render()[0].decode().splitlines()
    (line,) = [line for line in lines if line.startswith(f"fastserve:{name}")]
    return float(line.split()[-1])


async def until_served_by(engine: AsyncEngine, count: int) -> None:
    """Wait until so many replicas serve."""
    while engine.num_serving != count:
        await asyncio.sleep(0)  # lets the supervisors run


def test_a_killed_replica_s_streams_go_on_in_the_other() -> None:
    """Under 100 streams: each id once, new requests to the living alone, later to both again."""

    async def body() -> None:
        async with running() as engine:
            dead, living = engine.replicas
            streams = [
                engine.submit(Arrival([1, seed], params(seed, 60))) for seed in range(NUM_STREAMS)
            ]
            assert num_given(dead) == num_given(living) == NUM_STREAMS // 2
            heads = await asyncio.gather(*(read_at_least(s, 5) for s in streams[:8]))
            assert dead.link is not None
            assert living.link is not None
            moved = set(dead.link._given)
            assert moved
            dead.link.process.send_signal(signal.SIGKILL)
            await until_served_by(engine, 1)
            assert engine.is_ready
            late = engine.submit(Arrival([7], params(500, 20)))
            assert living.link.has(late.number)
            while not living.link._given & moved:
                await asyncio.sleep(0)  # lets the supervisor reap it
            tails = await asyncio.gather(*map(read, streams))
            for seed, (tail, reason) in enumerate(tails):
                head = heads[seed] if seed < len(heads) else []
                assert head + tail == expected(seed, 60)
                assert reason is FinishReason.LENGTH
            assert (await read(late))[0] == expected(500, 20)
            assert 0 < figure(engine, 'requests_resumed_total{engine="1"') <= len(moved)
            assert figure(engine, 'engine_restarts_total{engine="0"') == 1
            await until_served_by(engine, 2)
            assert figure(engine, "replicas_serving") == 2
            again = [engine.submit(Arrival([9], params(seed, 30))) for seed in range(8)]
            assert num_given(dead) == num_given(living) == 4
            assert [ids for ids, _ in await asyncio.gather(*map(read, again))] == [
                expected(seed, 30) for seed in range(8)
            ]

    run(body)


def test_a_silent_replica_is_replaced_and_its_streams_go_on() -> None:
    """One that is stopped says nothing: the other takes its requests, and nothing comes twice."""

    async def body() -> None:
        async with running(engine_timeout_s=1.5) as engine:
            silent, _ = engine.replicas
            streams = [engine.submit(Arrival([1], params(seed, 300))) for seed in range(4)]
            heads = await asyncio.gather(*(read_at_least(s, 5) for s in streams))
            assert num_given(silent) == 2
            assert silent.link is not None
            process = silent.link.process
            process.send_signal(signal.SIGSTOP)
            tails = await asyncio.gather(*map(read, streams))
            for seed, (head, (tail, _)) in enumerate(zip(heads, tails, strict=True)):
                assert head + tail == expected(seed, 300)
            assert process.returncode == -signal.SIGKILL
            assert figure(engine, 'requests_resumed_total{engine="1"') == 2
            assert figure(engine, 'engine_restarts_total{engine="1"') == 0, "it never was silent"

    run(body)


def test_a_request_that_kills_replicas_ends_alone() -> None:
    """Again and again: it gets an error, all others their own ids, and both replicas go on."""

    async def body() -> None:
        async with running("dies-on-poison") as engine:
            streams = [engine.submit(Arrival([1, 2], params(seed, 400))) for seed in range(4)]
            readers = [asyncio.create_task(read(stream)) for stream in streams]
            for seed in range(4, 6):
                poisoned = engine.submit(Arrival([1, POISON], params(seed, 5)))
                late = engine.submit(Arrival([3], params(seed, 5)))
                with pytest.raises(RequestFailedError, match="cannot be run"):
                    await read(poisoned)
                assert await read(late) == (expected(seed, 5), FinishReason.LENGTH)
            for seed, result in enumerate(await asyncio.gather(*readers)):
                assert result == (expected(seed, 400), FinishReason.LENGTH)
            await until_served_by(engine, 2)
            assert engine.num_requests == 0

    run(body)


def test_equal_beginnings_meet_in_one_replica() -> None:
    """Turns of two conversations: each is where its KV is, and the engines find it there."""

    async def body() -> None:
        async with running() as engine:
            prompts = [list(range(100, 400)), list(range(1000, 1300))]
            homes: list[set[int]] = [set(), set()]
            cached: list[int] = []
            for turn in range(4):
                for which, prompt in enumerate(prompts):
                    stream = engine.submit(Arrival(prompt, params(turn, 8)))
                    homes[which] |= {
                        number
                        for number, replica in enumerate(engine.replicas)
                        if replica.link is not None and replica.link.has(stream.number)
                    }
                    async for update in stream:
                        if update.metrics is not None:
                            cached.append(update.metrics.cached_tokens)
                    prompts[which] = [*prompt, *expected(turn, 8), turn]
            assert sorted(map(len, homes)) == [1, 1]
            assert homes[0] != homes[1]
            assert cached[:2] == [0, 0]
            assert all(count >= 288 for count in cached[2:])

    run(body)


def test_without_any_replica_there_is_one_line() -> None:
    """None can be loaded: `ready` and streams raise the reason."""

    async def body() -> None:
        config = EngineConfig(model="unloadable", data_parallel_size=2)
        engine = AsyncEngine(config, COMMAND)
        await engine.start()
        try:
            stream = engine.submit(Arrival([1], params(1, 5)))
            with pytest.raises(EngineDeadError, match=r"^the weights are not there$"):
                await engine.ready()
            with pytest.raises(EngineDeadError, match=r"^the weights are not there$"):
                await read(stream)
            assert engine.is_dead
            assert engine.is_misconfigured
        finally:
            await engine.close()

    run(body)


def test_each_replica_has_a_journal_of_its_own() -> None:
    """Two engines do not write one file; a single one keeps the name that was given."""
    several = EngineConfig(journal="a/j.jsonl", data_parallel_size=2)
    assert [replica_config(several, n).journal for n in range(2)] == ["a/j.jsonl.0", "a/j.jsonl.1"]
    assert replica_config(EngineConfig(journal="j"), 0).journal == "j"
    assert replica_config(EngineConfig(data_parallel_size=2), 1).journal is None
