"""The engine process and its API side: streams, aborts, deaths and restarts."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest

from fastserve.client.async_engine import AsyncEngine
from fastserve.client.interfaces import EngineDeadError
from fastserve.client.streams import RequestStream
from fastserve.client.supervisor import MAX_RESTARTS
from fastserve.core.messages import RequestFailedError
from fastserve.core.request import Arrival, FinishReason, SamplingParams
from fastserve.settings.engine import EngineConfig
from fastserve.settings.server import ENGINE_TIMEOUT_S
from tests.engine.engine_process import FAILING_STEP, POISON
from tests.fake_executor import default_token

pytestmark = pytest.mark.processes

T = TypeVar("T")
COMMAND = (sys.executable, "-m", "tests.engine.engine_process", "--engine-fd")


@asynccontextmanager
async def running(
    model: str = "paced", policy: str = "fcfs", engine_timeout_s: float = ENGINE_TIMEOUT_S
) -> AsyncIterator[AsyncEngine]:
    """Yield a started engine that is closed in the end."""
    config = EngineConfig(model=model, scheduling_policy=policy)
    engine = AsyncEngine(config, COMMAND, engine_timeout_s=engine_timeout_s)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def run(test: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine function with a time limit."""

    async def limited() -> T:
        async with asyncio.timeout(60):
            return await test()

    return asyncio.run(limited())


def expected(seed: int, count: int) -> list[int]:
    """Return the ids of an undisturbed request."""
    return [default_token(seed, position) for position in range(count)]


def params(seed: int, max_tokens: int) -> SamplingParams:
    """Return plain parameters."""
    return SamplingParams(seed=seed, max_tokens=max_tokens)


async def read(stream: RequestStream) -> tuple[list[int], FinishReason | None]:
    """Read a stream to its end."""
    ids: list[int] = []
    reason = None
    async for update in stream:
        assert reason is None, "news after the terminal update"
        ids += [sample.token_id for sample in update.samples]
        reason = update.finish_reason
    return ids, reason


async def read_at_least(stream: RequestStream, count: int) -> list[int]:
    """Read until `count` ids have come."""
    ids: list[int] = []
    async for update in stream:
        ids += [sample.token_id for sample in update.samples]
        if len(ids) >= count:
            break
    return ids


async def until_idle(engine: AsyncEngine, since: float = 0.0) -> None:
    """Wait for a snapshot, taken after `since`, in which nothing runs and no block is held."""
    while True:
        stats = engine.stats
        if (
            stats
            and stats.at > since
            and not stats.num_requests
            and not stats.scheduler.device_blocks_used
        ):
            return
        await asyncio.sleep(0)  # lets the reader run


def kill(engine: AsyncEngine) -> None:
    """Kill the engine process."""
    assert engine.process is not None
    engine.process.send_signal(signal.SIGKILL)


def test_streams_run_side_by_side() -> None:
    """Requests sent before and after loading yield their own ids and one end each."""

    async def body() -> None:
        async with running() as engine:
            early = [engine.submit(Arrival([1, 2, 3], params(seed, 40))) for seed in range(6)]
            assert not engine.is_ready
            info = await engine.ready()
            assert info.model == "paced"
            assert engine.is_ready
            assert engine.progress == ("ready", 1.0)
            late = [engine.submit(Arrival([seed], params(seed, 25))) for seed in range(6, 12)]
            results = await asyncio.gather(*map(read, early + late))
            assert [ids for ids, _ in results] == [
                expected(seed, 40 if seed < 6 else 25) for seed in range(12)
            ]
            assert {reason for _, reason in results} == {FinishReason.LENGTH}
            assert engine.num_requests == 0
            await until_idle(engine)

    run(body)


def test_a_killed_engine_is_restarted_and_streams_go_on() -> None:
    """After a SIGKILL in mid-stream the ids equal those of an undisturbed run."""

    async def body() -> None:
        async with running() as engine:
            await engine.ready()
            streams = [engine.submit(Arrival([1, 2], params(seed, 300))) for seed in range(4)]
            heads = await asyncio.gather(*(read_at_least(s, 20) for s in streams))
            assert all(len(head) < 300 for head in heads)
            first_process = engine.process
            kill(engine)
            tails = await asyncio.gather(*map(read, streams))
            for seed, (head, (tail, reason)) in enumerate(zip(heads, tails, strict=True)):
                assert head + tail == expected(seed, 300)
                assert reason is FinishReason.LENGTH
            assert engine.process is not first_process
            assert not engine.is_dead
            text = engine.metrics.render()[0].decode()
            assert 'fastserve:engine_restarts_total{engine="0",model_name="paced"} 1.0' in text
            assert 'fastserve:generation_tokens_total{engine="0",model_name="paced"} 1200.0' in text

    run(body)


def test_what_was_predicted_crosses_over() -> None:
    """Each end brings what was expected of it; a restarted engine's counts are added."""

    async def ended(stream: RequestStream) -> tuple[int, float]:
        ids, predicted = 0, 0.0
        async for update in stream:
            ids += len(update.samples)
            if update.metrics is not None:
                assert update.metrics.predicted_output_tokens is not None
                predicted = update.metrics.predicted_output_tokens
        return ids, predicted

    async def counted(engine: AsyncEngine, count: int) -> list[str]:
        """Wait until so many answers are counted, and return what is exported."""
        while True:
            text = engine.metrics.render()[0].decode().splitlines()
            deciles = [line for line in text if line.startswith("fastserve:answers_by_predicted")]
            if sum(float(line.split()[-1]) for line in deciles) == count:
                return text
            await asyncio.sleep(0)  # lets the reader run

    async def body() -> None:
        async with running(policy="learned") as engine:
            await engine.ready()
            ends = [await ended(engine.submit(Arrival([1], params(s, 30)))) for s in range(5)]
            await counted(engine, 5)
            kill(engine)
            ends += [await ended(engine.submit(Arrival([1], params(s, 30)))) for s in range(3)]
            text = await counted(engine, 8)
            labels = '{engine="0",model_name="paced"}'
            sums = {line.split()[0]: float(line.split()[1]) for line in text if line[0] != "#"}
            assert sums[f"fastserve:answered_tokens_total{labels}"] == 8 * 30
            assert sums[f"fastserve:predicted_output_tokens_total{labels}"] == pytest.approx(
                sum(predicted for _, predicted in ends)
            )
            assert all(0.0 < predicted <= 30.0 for _, predicted in ends)
            assert engine.stats is not None
            assert engine.stats.scheduler.forecasts is not None

    run(body)


def test_an_engine_that_keeps_dying_is_given_up() -> None:
    """After the bounded number of restarts every stream raises, and so does submit."""

    async def body() -> None:
        async with running("failing") as engine:
            await engine.ready()
            stream = engine.submit(Arrival([1], params(1, 2000)))
            with pytest.raises(EngineDeadError, match="the device fell off the bus"):
                await read(stream)
            assert engine.is_dead
            assert engine.error == "the device fell off the bus"
            assert len(stream.output_token_ids) > MAX_RESTARTS * (FAILING_STEP - 5)
            assert stream.output_token_ids == expected(1, len(stream.output_token_ids))
            with pytest.raises(EngineDeadError):
                engine.submit(Arrival([1], params(1, 1)))
            with pytest.raises(EngineDeadError):
                await engine.ready()

    run(body)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("fails-on-poison", "an illegal address"),
        ("dies-on-poison", r"the engine process died \(killed by signal 9\)"),
    ],
)
def test_a_request_that_kills_the_engine_ends_alone(model: str, reason: str) -> None:
    """Again and again: it gets an error, all others their own ids, and the engine goes on."""

    async def body() -> None:
        async with running(model) as engine:
            await engine.ready()
            streams = [engine.submit(Arrival([1, 2], params(seed, 400))) for seed in range(4)]
            readers = [asyncio.create_task(read(stream)) for stream in streams]
            for seed in range(4, 7):
                poisoned = engine.submit(Arrival([1, POISON], params(seed, 5)))
                late = engine.submit(Arrival([3], params(seed, 5)))
                with pytest.raises(RequestFailedError, match=f"cannot be run: {reason}"):
                    await read(poisoned)
                assert await read(late) == (expected(seed, 5), FinishReason.LENGTH)
            for seed, (ids, reason_of_end) in enumerate(await asyncio.gather(*readers)):
                assert (ids, reason_of_end) == (expected(seed, 400), FinishReason.LENGTH)
            assert not engine.is_dead
            assert engine.num_requests == 0
            text = engine.metrics.render()[0].decode()
            assert 'request_success_total{engine="0",finished_reason="error",' in text

    run(body)


def test_a_step_that_fails_ends_its_requests_and_not_the_engine() -> None:
    """Again and again: an error with its reason, then others run in the same process."""

    async def body() -> None:
        async with running("fails-steps-on-poison") as engine:
            await engine.ready()
            process = engine.process
            for seed in range(3):
                updates = [
                    update async for update in engine.submit(Arrival([1, POISON], params(seed, 5)))
                ]
                assert updates[-1].finish_reason is FinishReason.ERROR
                assert updates[-1].error == "it was told to fail"
                assert await read(engine.submit(Arrival([1, 2], params(seed, 40)))) == (
                    expected(seed, 40),
                    FinishReason.LENGTH,
                )
            assert engine.process is process
            await until_idle(engine)
            text = engine.metrics.render()[0].decode()
            assert 'finished_reason="error",model_name="fails-steps-on-poison"} 3.0' in text

    run(body)


def test_a_suspect_whose_client_leaves_holds_nobody_up() -> None:
    """Aborts and stop strings of others are heeded during a trial, and new requests wait."""

    async def body() -> None:
        async with running("dies-on-poison") as engine:
            await engine.ready()
            streams = [engine.submit(Arrival([1, 2], params(seed, 1000))) for seed in range(3)]
            poisoned = engine.submit(Arrival([1, POISON], params(4, 5)))
            deaths = 0
            process = engine.process
            while deaths < 2:
                await asyncio.sleep(0)
                if engine.process is not process:
                    deaths, process = deaths + 1, engine.process
            streams[0].abort()
            streams[1].finish(len(streams[1].output_token_ids))
            poisoned.abort()
            assert (await read(engine.submit(Arrival([9], params(5, 5)))))[0] == expected(5, 5)
            assert (await read(streams[1]))[1] is FinishReason.STOP
            assert (await read(streams[2]))[0] == expected(2, 1000)
            await until_idle(engine)

    run(body)


def test_a_model_that_cannot_be_loaded_is_one_line() -> None:
    """Loading is not tried again; `ready` and waiting streams raise the reason."""

    async def body() -> None:
        async with running("unloadable") as engine:
            stream = engine.submit(Arrival([1], params(1, 5)))
            with pytest.raises(EngineDeadError, match=r"^the weights are not there$"):
                await engine.ready()
            with pytest.raises(EngineDeadError, match=r"^the weights are not there$"):
                await read(stream)
            assert engine.process is not None
            assert engine.process.returncode == 1

    run(body)


def test_a_host_that_does_not_join_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """It is another host's matter, and no misconfiguration: nothing tells where it was found."""

    async def body() -> None:
        async with running("lonely") as engine:
            with pytest.raises(EngineDeadError, match=r"^rank 1 did not join within 30 s$"):
                await engine.ready()
            assert not engine.is_misconfigured

    run(body)
    assert "Traceback" not in capfd.readouterr().err


def test_an_aborted_request_frees_its_blocks() -> None:
    """A client that leaves ends its request: the next snapshots show no blocks in use."""

    async def body() -> None:
        async with running() as engine:
            await engine.ready()
            stream = engine.submit(Arrival(range(500), params(1, 1500)))
            other = engine.submit(Arrival([7], params(2, 60)))
            await read_at_least(stream, 5)
            aborted_at = time.monotonic()
            stream.abort()
            stream.abort()
            assert await read(stream) == ([], None)
            assert (await read(other))[0] == expected(2, 60)
            await until_idle(engine, aborted_at)
            assert engine.num_requests == 0
            text = engine.metrics.render()[0].decode()
            aborted = (
                'request_success_total{engine="0",finished_reason="abort",model_name="paced"} 1.0'
            )
            assert aborted in text

    run(body)


def test_a_stop_string_ends_a_request_once() -> None:
    """`finish` yields one terminal update with STOP, and the memory is free."""

    async def body() -> None:
        async with running() as engine:
            await engine.ready()
            stream = engine.submit(Arrival([1], params(3, 2000)))
            head = await read_at_least(stream, 10)
            finished_at = time.monotonic()
            stream.finish(10)
            stream.finish(10)
            tail, reason = await read(stream)
            assert reason is FinishReason.STOP
            assert head + tail == expected(3, len(head + tail))
            await until_idle(engine, finished_at)

    run(body)


def test_a_stop_string_survives_the_death_of_the_engine() -> None:
    """A request whose text is complete ends with STOP though the engine never heard of it."""

    async def body() -> None:
        async with running() as engine:
            await engine.ready()
            stream = engine.submit(Arrival([1], params(3, 2000)))
            await read_at_least(stream, 10)
            kill(engine)
            stream.finish(10)
            _, reason = await read(stream)
            assert reason is FinishReason.STOP

    run(body)


def test_a_request_that_cannot_run_is_refused_alone() -> None:
    """The engine's objection reaches the stream as ValueError; others go on."""

    async def body() -> None:
        async with running() as engine:
            await engine.ready()
            other = engine.submit(Arrival([1], params(5, 30)))
            with pytest.raises(ValueError, match="exceed"):
                await read(engine.submit(Arrival(range(4000), params(1, 10))))
            assert (await read(other))[0] == expected(5, 30)

    run(body)


def test_values_of_a_wrong_type_are_refused_at_the_door() -> None:
    """What the wire cannot carry raises ValueError before it is sent."""

    async def body() -> None:
        async with running() as engine:
            await engine.ready()
            with pytest.raises(ValueError, match="int"):
                engine.submit(Arrival(["x"], params(1, 10)))  # type: ignore[list-item]
            assert engine.num_requests == 0
            assert (await read(engine.submit(Arrival([1], params(5, 3)))))[0] == expected(5, 3)

    run(body)


def test_a_request_without_a_seed_is_given_one() -> None:
    """The seed is drawn once, so that a restarted engine draws the same ids."""

    async def body() -> None:
        async with running() as engine:
            await engine.ready()
            ids, _ = await read(engine.submit(Arrival([1], SamplingParams(max_tokens=5))))
            again, _ = await read(engine.submit(Arrival([1], SamplingParams(max_tokens=5))))
            assert len(ids) == len(again) == 5
            assert ids != again

    run(body)


def test_choices_of_a_prompt_draw_by_seed_plus_index() -> None:
    """They are sent with one message, and one of them scores the prompt; a death changes nothing.

    Without a seed, one is drawn for all.
    """

    async def body() -> None:
        async with running() as engine:
            await engine.ready()
            first = Arrival([1, 2, 3], SamplingParams(seed=7, max_tokens=400, prompt_logprobs=0))
            streams = engine.submit_choices(first, 3)
            await asyncio.gather(*(read_at_least(stream, 5) for stream in streams))
            assert [stream.params.prompt_logprobs for stream in streams] == [0, None, None]
            kill(engine)
            ends = await asyncio.gather(*(read(stream) for stream in streams))
            assert {reason for _, reason in ends} == {FinishReason.LENGTH}
            assert [stream.output_token_ids for stream in streams] == [
                expected(7 + index, 400) for index in range(3)
            ]
            assert [stream.num_engines for stream in streams] == [2, 2, 2]
            unseeded = engine.submit_choices(Arrival([1], SamplingParams(max_tokens=5)), 2)
            seeds = [stream.params.seed for stream in unseeded]
            assert seeds[0] is not None
            assert seeds[1] == seeds[0] + 1
            await asyncio.gather(*(read(stream) for stream in unseeded))

    run(body)


def test_close_ends_open_streams_and_the_process() -> None:
    """Closing leaves no process, and no reader waiting."""

    async def body() -> None:
        async with running() as engine:
            await engine.ready()
            stream = engine.submit(Arrival([1], params(1, 2000)))
            await read_at_least(stream, 3)
        with pytest.raises(EngineDeadError, match="closed"):
            await read(stream)
        assert engine.process is not None
        assert engine.process.returncode == 0

    run(body)


def test_close_while_loading_ends_the_process() -> None:
    """An engine that never finishes loading is left at once."""

    async def body() -> None:
        async with running("endless") as engine:
            while engine.progress[0] != "loading weights":
                await asyncio.sleep(0)
        assert engine.process is not None
        assert engine.process.returncode == 0

    run(body)


def test_terminal_signals_leave_the_engine_alone() -> None:
    """SIGINT and SIGTERM are the parent's: the engine process goes on.

    Before it can say so itself it is out of the terminal's reach.
    """

    async def body() -> None:
        async with running() as engine:
            while engine.process is None:
                await asyncio.sleep(0)
            assert os.getpgid(engine.process.pid) == engine.process.pid
            await engine.ready()
            stream = engine.submit(Arrival([1], params(1, 100)))
            engine.process.send_signal(signal.SIGINT)
            engine.process.send_signal(signal.SIGTERM)
            ids, _ = await read(stream)
            assert ids == expected(1, 100)
            assert engine.process.poll() is None

    run(body)


def test_the_engine_dies_with_its_parent() -> None:
    """When the API process is killed, the engine process goes too."""
    parent = """
import asyncio, sys
from fastserve.settings.engine import EngineConfig
from fastserve.client.async_engine import AsyncEngine

async def main():
    engine = AsyncEngine(EngineConfig(), sys.argv[1:])
    await engine.start()
    await engine.ready()
    print(engine.process.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

    async def body() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", parent, *COMMAND, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        pid = int(await process.stdout.readline())
        child = os.pidfd_open(pid)
        gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(child, gone.set)
        process.kill()
        await process.wait()
        await gone.wait()
        asyncio.get_running_loop().remove_reader(child)
        os.close(child)

    run(body)
