"""Engine processes that are killed, stopped, hang or lose a thread: noticed, and no token the less.

The processes and the supervisor are real, the device is the checked fake of tests/engine.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import pytest

from fastserve.client import supervisor
from fastserve.client.async_engine import AsyncEngine
from fastserve.client.interfaces import EngineDeadError
from fastserve.client.streams import RequestStream
from fastserve.core.request import Arrival, FinishReason
from fastserve.wire.child import THREAD_DIED
from tests.client.test_async_engine import expected, kill, params, read, read_at_least, run, running
from tests.engine.engine_process import POISON

pytestmark = pytest.mark.processes

TIMEOUT_S = 1.0
NUM_STREAMS = 100


def stop(engine: AsyncEngine) -> None:
    """Stop the engine process: its connection is there, and nothing comes."""
    assert engine.process is not None
    os.kill(engine.process.pid, signal.SIGSTOP)


async def survive(fault: Callable[[AsyncEngine], None], num_faults: int) -> list[float]:
    """Do harm under a hundred streams each time, hold their ids; return the seconds to recover.

    All end before the next fault: who is there at three in a row without a token is blamed.
    """
    recoveries: list[float] = []
    async with running(engine_timeout_s=TIMEOUT_S) as engine:
        await engine.ready()
        for _ in range(num_faults):
            streams = [
                engine.submit(Arrival([1, seed], params(seed, 60))) for seed in range(NUM_STREAMS)
            ]
            readers = [asyncio.create_task(read(stream)) for stream in streams]

            def num_read(streams: Sequence[RequestStream] = streams) -> int:
                return sum(len(stream.output_token_ids) for stream in streams)

            while num_read() < 500:
                await asyncio.sleep(0)  # lets the reader run
            assert engine.num_requests > NUM_STREAMS // 2
            process = engine.process
            assert process is not None
            fault(engine)
            fault_at = time.monotonic()
            while engine.process is process:
                await asyncio.sleep(0.001)
            assert not engine.is_ready
            assert process.returncode == -signal.SIGKILL
            before = num_read()
            while num_read() == before:
                await asyncio.sleep(0.001)
            assert engine.is_ready
            recoveries.append(time.monotonic() - fault_at)
            for seed, (ids, reason) in enumerate(await asyncio.gather(*readers)):
                assert (ids, reason) == (expected(seed, 60), FinishReason.LENGTH)
    return recoveries


@pytest.mark.parametrize("fault", [kill, stop])
def test_a_fault_costs_a_hundred_streams_no_token(fault, caplog) -> None:
    """Twice in one life of the server: none lost, none twice, and not ready in between."""
    run(lambda: survive(fault, 2))
    told = [r.getMessage() for r in caplog.records if "starting it again" in r.getMessage()]
    assert len(told) == 2
    what = "killed by signal 9" if fault is kill else "said nothing for 1 s"
    assert all(what in line for line in told)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", [kill, stop])
def test_twenty_faults_cost_a_hundred_streams_no_token(fault, monkeypatch) -> None:
    """As many as a minute of service does not allow; how long each took is printed."""
    monkeypatch.setattr(supervisor, "MAX_RESTARTS", 20)
    recoveries = asyncio.run(survive(fault, 20))
    middle, longest = statistics.median(recoveries), max(recoveries)
    sys.stdout.write(f"{fault.__name__}: recovery p50 {middle:.2f} s, max {longest:.2f} s\n")


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ("step-hangs-on-poison", r"step \d+ has not ended for \d\.\d s"),
        ("loop-hangs-on-poison", r"the engine's loop has not come back for \d\.\d s"),
        ("thread-dies-on-poison", rf"the engine process died \(exit status {THREAD_DIED}\)"),
    ],
)
def test_what_hangs_or_dies_inside_is_found_from_inside(model, what, capfd, caplog) -> None:
    """While other threads live: it is told what and where, and streams go on in another process."""

    async def body() -> None:
        async with running(model, engine_timeout_s=TIMEOUT_S) as engine:
            await engine.ready()
            streams = [engine.submit(Arrival([1, 2], params(seed, 400))) for seed in range(4)]
            readers = [asyncio.create_task(read(stream)) for stream in streams]
            await read_at_least(engine.submit(Arrival([9], params(9, 5))), 5)
            process = engine.process
            poisoned = engine.submit(Arrival([1, POISON], params(5, 5)))
            while engine.process is process:
                await asyncio.sleep(0.001)
            poisoned.abort()
            for seed, (ids, reason) in enumerate(await asyncio.gather(*readers)):
                assert (ids, reason) == (expected(seed, 400), FinishReason.LENGTH)

    run(body)
    (line,) = [r.getMessage() for r in caplog.records if "starting it again" in r.getMessage()]
    assert re.match(what, line)
    said = capfd.readouterr().err
    if "hangs" in model:
        assert "the process ends where its threads are" in said
        where = "hang_the_loop" if "loop" in model else "step (engine.py:"
        (line,) = [line for line in said.splitlines() if " MainThread: " in line]
        assert where in line
    else:
        assert "the thread helper died, and the process with it" in said
        assert "OverflowError" in said


def test_a_process_that_cannot_say_that_it_is_loaded_is_no_engine(capfd) -> None:
    """Its writer dies of a number: that is its end, and not for ever loading at 100 %."""

    async def body() -> None:
        async with running("unsayable") as engine:
            with pytest.raises(EngineDeadError, match=f"exit status {THREAD_DIED}"):
                await engine.ready()

    run(body)
    assert "the thread engine-outbox died" in capfd.readouterr().err


def test_a_machine_without_descriptors_is_tried_again(monkeypatch, caplog) -> None:
    """At a restart there is no room for a process, for a while: streams wait, then go on."""
    monkeypatch.setattr(supervisor, "START_RETRY_S", 0.02)

    async def body() -> None:
        async with running() as engine:
            await engine.ready()
            replica = engine.replicas[0]
            start, num_tries = replica._start_process, 0

            async def refuse_thrice():
                nonlocal num_tries
                num_tries += 1
                if num_tries <= 3:
                    assert not engine.is_ready
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                return await start()

            replica._start_process = refuse_thrice
            stream = engine.submit(Arrival([1], params(1, 300)))
            await read_at_least(stream, 5)
            kill(engine)
            _, reason = await read(stream)
            assert reason is FinishReason.LENGTH
            assert stream.output_token_ids == expected(1, 300)
            assert num_tries == 4

    run(body)
    told = [record.getMessage() for record in caplog.records if "trying" in record.getMessage()]
    assert len(told) == 1
    assert "cannot be started: Too many open files" in told[0]


@pytest.mark.parametrize("has_served", [True, False])
def test_a_machine_that_never_has_room_ends_the_engine(monkeypatch, has_served) -> None:
    """After all tries; the first process, for which nobody waits, is tried once."""
    monkeypatch.setattr(supervisor, "START_RETRY_S", 0.001)

    async def body() -> None:
        async with running() as engine:
            replica = engine.replicas[0]
            num_tries = 0

            async def refuse():
                nonlocal num_tries
                num_tries += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            if has_served:
                await engine.ready()
            replica._start_process = refuse
            stream = engine.submit(Arrival([1], params(1, 2000)))
            if has_served:
                kill(engine)
            with pytest.raises(EngineDeadError, match="cannot be started: No space left on device"):
                await read(stream)
            await engine.over()
            assert engine.is_dead
            assert num_tries == (supervisor.START_TRIES if has_served else 1)

    run(body)


def test_closing_does_not_wait_for_a_machine_without_room(monkeypatch) -> None:
    """Between two tries as at any other time."""
    monkeypatch.setattr(supervisor, "START_RETRY_S", 1e6)

    async def body() -> None:
        async with running() as engine:
            await engine.ready()
            has_tried = asyncio.Event()

            async def refuse():
                has_tried.set()
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

            engine.replicas[0]._start_process = refuse
            kill(engine)
            await has_tried.wait()

    run(body)
