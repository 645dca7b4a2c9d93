"""Engines in processes of their own: what a killed or failing one costs."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys
from pathlib import Path

import pytest

from fastserve.client.async_engine import AsyncEngine
from fastserve.client.interfaces import EngineDeadError
from fastserve.core.request import Arrival, FinishReason, SamplingParams
from fastserve.launch.engine import open_engine
from fastserve.launch.server import open_async_engine
from fastserve.settings.engine import EngineConfig
from fastserve.wire.child import spawn
from tests.launch.engines import PROMPT, SMALL, generate, read, run, text_of


@pytest.mark.processes
def test_a_killed_engine_goes_on_with_the_same_tokens() -> None:
    """SIGKILL in mid-stream: what follows equals an undisturbed run, id for id."""
    params = SamplingParams(
        seed=5, temperature=1.0, top_k=20, max_tokens=200, ignore_eos=True, prompt_logprobs=1
    )
    engine, _ = open_engine(SMALL)
    undisturbed = generate(engine, params)
    engine.close()
    assert len(undisturbed) == 200

    async def body() -> tuple[list[int], FinishReason | None]:
        served = open_async_engine(SMALL)
        await served.start()
        try:
            await served.ready()
            stream = served.submit(Arrival(PROMPT, params))
            num_scores = 0
            async for update in stream:
                num_scores += len(update.prompt_logprobs)
                if len(stream.output_token_ids) >= 40:
                    break
            assert served.process is not None
            served.process.send_signal(signal.SIGKILL)
            async for update in stream:
                num_scores += len(update.prompt_logprobs)
                reason = update.finish_reason
            assert num_scores == len(PROMPT) - 1  # none is lost, none comes twice
            assert 'engine_restarts_total{engine="0",model_name="demo"} 1.0' in text_of(served)
            return stream.output_token_ids, reason
        finally:
            await served.close()

    assert run(body) == (undisturbed, FinishReason.LENGTH)


@pytest.mark.processes
def test_a_killed_replica_loses_no_token_of_a_hundred_streams() -> None:
    """Two replicas of a real model, one is killed: all ids equal those of one undisturbed run."""
    config = EngineConfig(model="demo", num_device_blocks=256, num_threads=1, deterministic=True)
    arrivals = [
        Arrival([10 + n, 20, 30], SamplingParams(seed=n, top_k=20, max_tokens=24, ignore_eos=True))
        for n in range(100)
    ]
    engine, _ = open_engine(config)
    handles = [engine.add(arrival) for arrival in arrivals]
    undisturbed: dict[int, list[int]] = {handle: [] for handle in handles}
    while engine.num_requests:
        for update in engine.step():
            undisturbed[update.handle] += [sample.token_id for sample in update.samples]
    engine.close()

    async def body() -> None:
        served = open_async_engine(dataclasses.replace(config, data_parallel_size=2))
        await served.start()
        try:
            await asyncio.gather(*(replica.ready() for replica in served.replicas))
            streams = [served.submit(arrival) for arrival in arrivals]
            while len(streams[0].output_token_ids) < 5:
                await asyncio.sleep(0)  # lets the reader run
            assert served.process is not None
            served.process.send_signal(signal.SIGKILL)
            ended = await asyncio.gather(*map(read, streams))
            assert ended == [(undisturbed[handle], FinishReason.LENGTH) for handle in handles]
            assert 'engine_restarts_total{engine="0",model_name="demo"} 1.0' in text_of(served)
            name = 'fastserve:requests_resumed_total{engine="1"'
            (resumed,) = [s for s in text_of(served).splitlines() if s.startswith(name)]
            assert float(resumed.split()[-1]) > 0
            await served.replicas[0].ready()
            again = [served.submit(arrival) for arrival in arrivals[:4]]
            first = served.replicas[0].link
            assert first is not None
            assert sum(first.has(stream.number) for stream in again) == 2
            assert await asyncio.gather(*map(read, again)) == ended[:4]
        finally:
            await served.close()

    run(body)


FAILING_PROCESS = """
import sys
from fastserve.executor.model_runner import ModelRunner
from fastserve.launch.__main__ import main

run = ModelRunner.run

def run_and_fail(self, works, states):
    done = run(self, works, states)
    if any(666 in state.token_ids for state in states):
        raise FloatingPointError("in the middle of a step")
    return done

ModelRunner.run = run_and_fail
sys.exit(main())
"""


@pytest.mark.processes
def test_a_failing_step_of_a_real_worker_leaves_the_engine_process_whole() -> None:
    """Again and again: its request ends with the reason, the next one as if it had been alone."""
    params = SamplingParams(seed=5, temperature=1.0, top_k=20, max_tokens=20, ignore_eos=True)
    engine, _ = open_engine(SMALL)
    undisturbed = generate(engine, params)
    engine.close()

    async def body() -> None:
        served = AsyncEngine(SMALL, (sys.executable, "-c", FAILING_PROCESS, "--engine-fd"))
        await served.start()
        try:
            await served.ready()
            process = served.process
            for _ in range(3):
                *_, last = [
                    update async for update in served.submit(Arrival([666, *PROMPT], params))
                ]
                assert last.finish_reason is FinishReason.ERROR
                assert last.error == "FloatingPointError: in the middle of a step"
                ids, reason = await read(served.submit(Arrival(PROMPT, params)))
                assert (ids, reason) == (undisturbed, FinishReason.LENGTH)
            assert served.process is process
            while served.stats is None or served.stats.scheduler.device_blocks_used:
                await asyncio.sleep(0)
        finally:
            await served.close()

    run(body)


@pytest.mark.processes
def test_requests_share_the_engine_process_under_pressure() -> None:
    """Requests that outgrow the pool together preempt each other and still get their own ids."""

    def params(seed: int) -> SamplingParams:
        return SamplingParams(seed=seed, temperature=0.0, max_tokens=100, ignore_eos=True)

    engine, _ = open_engine(SMALL)
    alone = generate(engine, params(0))
    engine.close()

    async def body() -> None:
        served = open_async_engine(SMALL)
        await served.start()
        try:
            await served.ready()
            streams = [served.submit(Arrival(PROMPT, params(seed))) for seed in range(8)]
            results = await asyncio.gather(*map(read, streams))
            assert results == [(alone, FinishReason.LENGTH)] * 8
            while served.stats is None or served.stats.num_requests:
                await asyncio.sleep(0)
            assert served.stats.scheduler.num_preemptions > 0
            assert served.stats.scheduler.device_blocks_used == 0
        finally:
            await served.close()

    run(body)


@pytest.mark.processes
def test_a_model_that_is_not_there_is_one_line() -> None:
    """The engine process says what the user must know, and ends."""

    async def body() -> None:
        served = open_async_engine(EngineConfig(model="/no/such/model"))
        await served.start()
        with pytest.raises(EngineDeadError, match="no such directory"):
            await served.ready()
        await served.close()

    run(body)


@pytest.mark.processes
def test_no_library_has_a_say_in_the_exit_status(tmp_path: Path) -> None:
    """What is left to do when a child ends is nothing, so nothing can go wrong with it."""
    (tmp_path / "sitecustomize.py").write_text("import atexit, os; atexit.register(os.abort)")
    python_path = os.pathsep.join((str(tmp_path), *filter(None, sys.path)))
    environment = {**os.environ, "PYTHONPATH": python_path}
    command = (sys.executable, "-P", "-m", "fastserve.launch", "--engine-fd")
    process, ours = spawn(command, environment)
    ours.close()
    assert process.wait(30) == 0
