"""The engine process: loads what the first message names, then steps until the API leaves.

Rules: the loop never polls and never blocks on the socket. One thread reads commands and wakes the
executor, one writes what the loop has queued; the engine itself belongs to the loop's thread. The
other end's departure ends the process, as does the death of the parent. Interrupts from a terminal
are the parent's to answer: it drains first. Must not know: torch, text, HTTP.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import queue
import socket
import threading
from collections.abc import Callable
from typing import NamedTuple

from fastserve.core.messages import RequestUpdate
from fastserve.core.request import Arrival, Handle
from fastserve.engine.engine import Engine
from fastserve.engine.length_file import LengthFile
from fastserve.host.garbage_collector import quiet_garbage_collector
from fastserve.settings.engine import EngineConfig
from fastserve.settings.option import ConfigError
from fastserve.wire.child import be_child
from fastserve.wire.engine_messages import (
    Add,
    Alive,
    Command,
    Configure,
    EngineInfo,
    Event,
    Failed,
    Finish,
    Progress,
    Ready,
    Rejected,
    RequestNumber,
    Updates,
    decode_command,
)
from fastserve.wire.frames import encode_frame, read_frame
from fastserve.wire.joining import JoinError

logger = logging.getLogger(__name__)

STATS_INTERVAL_S = 0.5
HEARTBEAT_S = 1.0


class Opened(NamedTuple):
    """An engine that is ready to serve, and where what it learns is kept, if it learns."""

    engine: Engine
    info: EngineInfo
    lengths: LengthFile | None = None


OpenEngine = Callable[[EngineConfig, int, Callable[[str, float], None]], Opened]
"""Loads what a configuration says as one of its replicas; told what loading is at."""


class Inbox:
    """Reads commands on a thread of its own; `on_arrival` is told of each, and of the end."""

    def __init__(self, connection: socket.socket) -> None:
        self.has_ended = False  # the other end has gone
        self.is_closed = False  # and everything it had sent was taken
        self.on_arrival: Callable[[], None] = lambda: None
        self._stream = connection.makefile("rb")
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="engine-inbox", daemon=True).start()

    def _read(self) -> None:
        try:
            while (payload := read_frame(self._stream)) is not None:
                self._commands.put(decode_command(payload))
                self.on_arrival()
        except (OSError, ValueError):
            logger.exception("the connection to the API process broke")
        finally:
            self.has_ended = True
            self._commands.put(None)
            self.on_arrival()

    def get(self) -> Command | None:
        """Wait for one command; None when the other end has gone."""
        command = self._commands.get()
        self.is_closed |= command is None
        return command

    def drain(self) -> list[Command]:
        """Return the commands that have arrived, without waiting."""
        commands = []
        while not self.is_closed and not self._commands.empty():
            if (command := self.get()) is not None:
                commands.append(command)
        return commands


class Outbox:
    """Writes events on a thread of its own, so that a slow reader never holds up a step."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="engine-outbox", daemon=True)
        self._thread.start()

    def send(self, event: Event) -> None:
        """Queue one event."""
        self._events.put(event)

    def close(self) -> None:
        """Write what is queued, then stop."""
        self._events.put(None)
        self._thread.join()

    def _write(self) -> None:
        try:
            while (event := self._events.get()) is not None:
                self._connection.sendall(encode_frame(event))
        except OSError as error:  # the inbox sees the same end and stops the loop
            logger.debug("the API process is gone: %s", error)


class Loop:
    """Carries commands to the engine and its news back, translating request numbers to handles."""

    def __init__(
        self, engine: Engine, inbox: Inbox, outbox: Outbox, lengths: LengthFile | None = None
    ) -> None:
        self.engine = engine
        self._lengths = lengths
        self._inbox = inbox
        self._outbox = outbox
        self._handles: dict[RequestNumber, Handle] = {}
        self._numbers: dict[Handle, RequestNumber] = {}
        # When the next snapshot goes out, the first at once; inf while nothing changes.
        self._stats_due = engine.clock.now()

    def run(self) -> None:
        """Serve until the other end has gone."""
        self._inbox.on_arrival = self.engine.executor.wake
        while self.turn():
            pass

    def turn(self, until: float = math.inf) -> bool:
        """Take in what was said, step once, and say what is new; False: the other end has gone."""
        engine = self.engine
        news = [update for command in self._inbox.drain() if (update := self._apply(command))]
        if self._inbox.is_closed:
            return False
        news += engine.step(min(until, self.next_due))
        self._send(news)
        # Without news a step is under way, or there is none to hold up.
        if self._lengths is not None and not news:
            self._lengths.keep(engine.clock.now())
        return True

    def close(self) -> None:
        """Keep what was learned, and let go of everything that was opened."""
        try:
            if self._lengths is not None:
                self._lengths.close()
        finally:
            self.engine.close()

    @property
    def next_due(self) -> float:
        """When it has something to say or to keep, though nothing happens until then."""
        return min(self._stats_due, math.inf if self._lengths is None else self._lengths.due_at)

    def running(self) -> tuple[RequestNumber, ...]:
        """Return the requests whose steps are under way."""
        handles = self.engine.scheduler.handles_in_flight
        return tuple(self._numbers[handle] for handle in handles if handle in self._numbers)

    def _apply(self, command: Command) -> RequestUpdate | None:
        self._touch()
        if isinstance(command, Add):
            self._add(command)
            return None
        if isinstance(command, Configure):
            raise ValueError("a second configure message")
        handle = self._handles.get(command.number)
        if handle is None:  # it ended while the command was on its way
            return None
        if isinstance(command, Finish):
            return self.engine.finish(handle, command.num_output_tokens)
        return self.engine.abort(handle)

    def _add(self, command: Add) -> None:
        arrival = command.arrival
        self._add_one(command.number, arrival)
        for number, seed in command.siblings:
            params = dataclasses.replace(arrival.params, seed=seed, prompt_logprobs=None)
            self._add_one(number, dataclasses.replace(arrival, params=params))

    def _add_one(self, number: RequestNumber, arrival: Arrival) -> None:
        try:
            handle = self.engine.add(arrival)
        except ValueError as error:
            self._outbox.send(Rejected(number, str(error)))
            return
        self._handles[number] = handle
        self._numbers[handle] = number

    def _forget(self, handle: Handle) -> None:
        del self._handles[self._numbers.pop(handle)]

    def _send(self, news: list[RequestUpdate]) -> None:
        updates = []
        for update in news:
            number = self._numbers.get(update.handle)
            if number is None:
                continue
            updates.append((number, update))
            if update.finish_reason is not None:
                self._forget(update.handle)
        if updates:
            self._touch()
        stats = None
        now = self.engine.clock.now()
        is_changed = self._stats_due < math.inf
        if is_changed and (now >= self._stats_due or self.engine.is_idle):
            stats = self.engine.stats()
            # Busy: go on every interval. Idle: this was the last until something happens.
            self._stats_due = math.inf if self.engine.is_idle else now + STATS_INTERVAL_S
        if updates or stats is not None:
            self._outbox.send(Updates(updates, stats))

    def _touch(self) -> None:
        if self._stats_due == math.inf:
            self._stats_due = self.engine.clock.now() + STATS_INTERVAL_S


def say_alive(outbox: Outbox) -> None:
    """Say so every HEARTBEAT_S, as long as the process runs: a step may take longer than that."""
    never = threading.Event()
    while not never.wait(HEARTBEAT_S):
        outbox.send(Alive())


def run(fd: int, open_engine: OpenEngine) -> int:
    """Be the engine process on the inherited socket `fd`; return the exit status."""
    connection = be_child(fd)
    inbox, outbox = Inbox(connection), Outbox(connection)
    try:
        loop = _load(inbox, outbox, open_engine)
    except ConfigError as error:  # which needs no more than its one line
        return _fail(outbox, Failed(_one_line(error), is_misconfiguration=True))
    except JoinError as error:  # found out here, and the matter of another host
        return _fail(outbox, Failed(_one_line(error)))
    except Exception as error:
        logger.exception("the engine could not be loaded")
        return _fail(outbox, Failed(_one_line(error)))
    if loop is None:
        return 0
    try:
        loop.run()
    except Exception as error:
        logger.exception("the engine failed")
        return _fail(outbox, Failed(_one_line(error), running=loop.running()))
    finally:
        loop.close()
    return 0


def _fail(outbox: Outbox, last_words: Failed) -> int:
    outbox.send(last_words)
    outbox.close()
    return 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _load(inbox: Inbox, outbox: Outbox, open_engine: OpenEngine) -> Loop | None:
    """Load what the first message names; None when the other end leaves before it says."""
    first = inbox.get()
    if first is None:
        return None
    if not isinstance(first, Configure):
        raise ValueError(f"expected a configure message first, got {type(first).__name__}")

    def leave_if_abandoned() -> None:
        if inbox.has_ended:
            os._exit(0)  # loading cannot be interrupted in any other way

    inbox.on_arrival = leave_if_abandoned
    leave_if_abandoned()
    opened = open_engine(
        first.config,
        first.replica,
        lambda stage, fraction: outbox.send(Progress(stage, fraction)),
    )
    quiet_garbage_collector()
    outbox.send(Ready(opened.info))
    if first.config.data_parallel_size > 1:
        threading.Thread(
            target=say_alive, args=(outbox,), name="engine-heartbeat", daemon=True
        ).start()
    return Loop(opened.engine, inbox, outbox, opened.lengths)
