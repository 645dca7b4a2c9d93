"""A child on a socket: it hears and is heard, leaves when asked, and never stays behind."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from fastserve.host.log import open_log
from fastserve.wire import child as child_module
from fastserve.wire.child import THREAD_DIED, Child, be_child, reap, spawn
from fastserve.wire.frames import encode_frame, read_frame

pytestmark = pytest.mark.processes

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


class Number(msgspec.Struct, frozen=True, tag="number"):
    """A message of a schema that no engine knows."""

    value: int


decode = msgspec.msgpack.Decoder(Number).decode


def command(kind: str) -> tuple[str, ...]:
    """Return the command line of this file's child."""
    return (sys.executable, "-m", "tests.wire.test_child", kind)


def test_it_answers_until_it_is_asked_to_leave() -> None:
    """Messages of any schema go there and back; closing the socket ends it with status 0."""

    async def talk() -> tuple[list[int], str]:
        child = await Child.start(command("doubles"), ENVIRONMENT, decode, "test")
        for value in (1, 2, 3):
            child.send(encode_frame(Number(value)))
        heard: list[int] = []
        async for event in child.events():
            heard.append(event.value)
            if len(heard) == 3:
                child.close()
        return heard, await child.cause_of_death()

    assert asyncio.run(talk()) == ([2, 4, 6], "the test process died (exit status 0)")


def test_the_signal_that_killed_it_is_named() -> None:
    """A child that is killed has no more to say, and the cause says by what."""

    async def kill() -> tuple[list[Number], str]:
        child = await Child.start(command("doubles"), ENVIRONMENT, decode, "test")
        child.process.kill()
        heard = [event async for event in child.events()]
        child.close()
        return heard, await child.cause_of_death()

    assert asyncio.run(kill()) == ([], "the test process died (killed by signal 9)")


def test_one_that_does_not_leave_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals of the terminal and the end of the connection do nothing to it; the grace ends."""
    monkeypatch.setattr(child_module, "EXIT_GRACE_S", 0.2)
    process, connection = spawn(command("stays"), ENVIRONMENT)
    with connection, connection.makefile("rb") as stream:
        assert read_frame(stream) is not None
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
    assert reap(process) == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="Linux kills the children of the dead")
def test_it_dies_with_its_parent() -> None:
    """A child whose parent is killed ends, though it does not look at its connection."""
    process, connection = spawn(command("has a child"), ENVIRONMENT)
    with connection, connection.makefile("rb") as stream:
        payload = read_frame(stream)
        assert payload is not None
        grandchild = os.pidfd_open(decode(payload).value)
        process.kill()
        process.wait()
        ended, _, _ = select.select([grandchild], [], [], 30)
        os.close(grandchild)
    assert ended


def test_a_thread_that_dies_ends_it_with_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    """Others would wait for ever for what that thread was to do."""
    process, connection = spawn(command("has a dying thread"), ENVIRONMENT)
    with connection:
        assert process.wait(30) == THREAD_DIED
    said = capfd.readouterr().err
    assert "the thread writer died, and the process with it" in said
    assert "OverflowError: " in said


def test_one_that_cannot_be_started_leaves_nothing_open() -> None:
    """Where it is tried again, descriptors must not run out."""
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            spawn(("/no/such/program",), ENVIRONMENT)
    assert os.listdir("/proc/self/fd") == before


def test_one_that_reads_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped, and its socket is full: to close is to let go of what it was not told."""
    monkeypatch.setattr(child_module, "EXIT_GRACE_S", 0.2)

    async def leave() -> str:
        child = await Child.start(command("stays"), ENVIRONMENT, decode, "test")
        child.process.send_signal(signal.SIGSTOP)
        for _ in range(100):
            child.send(b"x" * 100_000)
        child.close()
        async for _ in child.events():
            pass
        return await child.cause_of_death()

    assert asyncio.run(leave()) == "the test process died (killed by signal 9)"


def main(kind: str, fd: int) -> None:
    """Be the child."""
    open_log("INFO")
    connection = be_child(fd)
    stream = connection.makefile("rb")
    if kind == "doubles":
        while (payload := read_frame(stream)) is not None:
            connection.sendall(encode_frame(Number(2 * decode(payload).value)))
    elif kind == "stays":
        connection.sendall(encode_frame(Number(0)))
        signal.pause()
    elif kind == "has a dying thread":
        threading.Thread(target=encode_frame, args=(Number(2**70),), name="writer").start()
        signal.pause()
    else:
        grandchild, theirs = spawn(command("stays"), ENVIRONMENT)
        with theirs.makefile("rb") as its_stream:
            read_frame(its_stream)  # it is a child by now
        connection.sendall(encode_frame(Number(grandchild.pid)))
        signal.pause()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
