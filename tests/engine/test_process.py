"""The engine process' two threads and its manners at the socket, without an API side."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fastserve.core.request import Arrival, FinishReason, SamplingParams
from fastserve.settings.engine import EngineConfig
from fastserve.wire.engine_messages import (
    Abort,
    Add,
    Command,
    Configure,
    Event,
    Failed,
    Finish,
    Progress,
    Ready,
    RequestNumber,
    Updates,
    decode_event,
)
from fastserve.wire.frames import encode_frame, read_frame


@contextmanager
def engine_process() -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """Start the engine process of the tests and yield it with our end of its socket."""
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    with ours:
        with theirs:
            process = subprocess.Popen(
                (sys.executable, "-m", "tests.engine.engine_process", "--engine-fd",
                 str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )  # fmt: skip
        try:
            yield process, ours
        finally:
            process.kill()
            process.wait()


def send(connection: socket.socket, *commands: Command) -> None:
    """Send commands in one piece."""
    connection.sendall(b"".join(map(encode_frame, commands)))


def events(connection: socket.socket) -> Iterator[Event]:
    """Yield what the process says until it has no more to say."""
    with connection.makefile("rb") as stream:
        while (payload := read_frame(stream)) is not None:
            yield decode_event(payload)


@pytest.mark.processes
def test_a_request_that_ends_before_its_abort_arrives_is_no_fault() -> None:
    """Commands for what has ended, or never was, are nothing; every step is one message."""
    with engine_process() as (process, connection):
        send(connection, Configure(EngineConfig(model="paced")))
        news = events(connection)
        assert next(news) == Progress("loading weights", 0.5)
        assert isinstance(next(news), Ready)
        add = Add(RequestNumber(7), Arrival([1], SamplingParams(seed=1, max_tokens=5)))
        send(connection, Abort(RequestNumber(99)), Finish(RequestNumber(98), 1), add)
        tokens = 0
        for event in news:
            assert isinstance(event, Updates)
            for number, update in event.updates:
                assert number == 7
                tokens += len(update.samples)
            if event.updates and event.updates[-1][1].finish_reason is not None:
                break
        assert tokens == 5
        send(connection, Abort(RequestNumber(7)), Finish(RequestNumber(7), 1))
        connection.shutdown(socket.SHUT_WR)
        assert all(isinstance(event, Updates) and not event.updates for event in news)
        assert process.wait(30) == 0


@pytest.mark.processes
def test_an_abort_is_answered_with_the_one_end_of_its_request() -> None:
    """Like every other request, one that is aborted under way has exactly one terminal event."""
    with engine_process() as (process, connection):
        send(connection, Configure(EngineConfig(model="paced")))
        arrival = Arrival([1], SamplingParams(seed=1, max_tokens=2000))
        send(connection, Add(number=RequestNumber(7), arrival=arrival))
        ends: list[FinishReason] = []
        is_aborted = False
        for event in events(connection):
            if not isinstance(event, Updates) or not event.updates:
                continue
            if not is_aborted:
                is_aborted = True
                send(connection, Abort(RequestNumber(7)), Abort(RequestNumber(7)))
            assert not ends, "news after the terminal event"
            ends += [u.finish_reason for _, u in event.updates if u.finish_reason is not None]
            if ends:
                send(connection, Abort(RequestNumber(7)))
                connection.shutdown(socket.SHUT_WR)
        assert ends == [FinishReason.ABORT]
        assert process.wait(30) == 0


@pytest.mark.processes
def test_the_first_message_must_be_the_configuration() -> None:
    """Anything else ends the process with the reason."""
    with engine_process() as (process, connection):
        send(connection, Abort(RequestNumber(1)))
        (event,) = events(connection)
        assert event == Failed("expected a configure message first, got Abort")
        assert process.wait(30) == 1


@pytest.mark.processes
def test_a_departure_before_the_configuration_is_quiet() -> None:
    """An API process that was stopped at once leaves nothing behind."""
    with engine_process() as (process, connection):
        connection.close()
        assert process.wait(30) == 0


@pytest.mark.processes
@pytest.mark.parametrize("garbage", [b"\0\0\0\x05hello", b"\xff\xff\xff\xffhello", b"\0"])
def test_garbage_on_the_wire_ends_the_process(garbage: bytes) -> None:
    """What is no frame or no command is the end of the conversation, not of the machine."""
    with engine_process() as (process, connection):
        send(connection, Configure(EngineConfig(model="paced")))
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)
        assert process.wait(30) == 0
