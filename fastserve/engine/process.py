"""The engine process: loads what the first message names, then steps until the API leaves.

Rules: the loop never polls and never blocks on the socket. One thread reads commands and wakes the
executor, one writes what the loop has queued, one says that the process lives; the engine itself
belongs to the loop's thread. The other end's departure ends the process, as do the death of the
parent, that of a thread, and work that hangs: another process may go on with it. Interrupts from a
terminal are the parent's to answer: it drains first. Must not know: torch, text, HTTP.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, NoReturn

from fastserve.core.messages import RequestUpdate
from fastserve.core.request import Arrival, Handle
from fastserve.engine.boxes import Inbox, Outbox
from fastserve.engine.engine import Engine
from fastserve.engine.heartbeat import Heartbeat, where_threads_are
from fastserve.engine.length_file import LengthFile
from fastserve.engine.step_watch import Hang, StepWatch
from fastserve.host.garbage_collector import quiet_garbage_collector
from fastserve.host.log import end_process
from fastserve.settings.option import ConfigError
from fastserve.wire.child import be_child
from fastserve.wire.engine_messages import (
    Add,
    Alive,
    Command,
    Configure,
    EngineInfo,
    Failed,
    Finish,
    Progress,
    Ready,
    Rejected,
    RequestNumber,
    Updates,
    beat_interval_s,
)
from fastserve.wire.joining import JoinError

logger = logging.getLogger(__name__)

STATS_INTERVAL_S = 0.5
COMPILING_S = 60.0
"""What the first step may take more where a device compiles its kernels when they are needed."""
LAST_WORDS_S = 1.0
"""That a process that hangs has to say so."""


class Opened(NamedTuple):
    """An engine that is ready to serve, and where what it learns is kept, if it learns."""

    engine: Engine
    info: EngineInfo
    lengths: LengthFile | None = None


OpenEngine = Callable[[Configure, Callable[[str, float], None]], Opened]
"""Loads what the first message says; the second argument is told what loading is at."""


class Loop:
    """Carries commands to the engine and its news back, translating request numbers to handles."""

    def __init__(
        self,
        engine: Engine,
        inbox: Inbox,
        outbox: Outbox,
        lengths: LengthFile | None = None,
    ) -> None:
        self.engine = engine
        self.on_turn: Callable[[float], None] = lambda now: None  # told when a wait is over
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
        self.on_turn(engine.clock.now())
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
        return self.numbers_of(self.engine.scheduler.handles_in_flight)

    def numbers_of(self, handles: Iterable[Handle]) -> tuple[RequestNumber, ...]:
        """Return the numbers of those that have not ended; callable from any thread."""
        numbers = map(self._numbers.get, handles)
        return tuple(number for number in numbers if number is not None)

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


def run(fd: int, open_engine: OpenEngine) -> int:
    """Be the engine process on the inherited socket `fd`; return the exit status."""
    connection = be_child(fd)
    inbox, outbox = Inbox(connection), Outbox(connection)
    try:
        loaded = _load(inbox, outbox, open_engine)
    except ConfigError as error:  # which needs no more than its one line
        return _fail(outbox, Failed(_one_line(error), is_misconfiguration=True))
    except JoinError as error:  # found out here, and the matter of another host
        return _fail(outbox, Failed(_one_line(error)))
    except Exception as error:
        logger.exception("the engine could not be loaded")
        return _fail(outbox, Failed(_one_line(error)))
    if loaded is None:
        return 0
    loop, heartbeat = loaded
    try:
        loop.run()
    except Exception as error:
        logger.exception("the engine failed")
        return _fail(outbox, Failed(_one_line(error), running=loop.running()))
    finally:
        heartbeat.stop()
        loop.close()
    return 0


def _fail(outbox: Outbox, last_words: Failed) -> int:
    outbox.send(last_words)
    outbox.close()
    return 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _load(inbox: Inbox, outbox: Outbox, open_engine: OpenEngine) -> tuple[Loop, Heartbeat] | None:
    """Load what the first message names; None when the other end leaves before it says."""
    first = inbox.get()
    if first is None:
        return None
    if not isinstance(first, Configure):
        raise ValueError(f"expected a configure message first, got {type(first).__name__}")

    def leave_if_abandoned() -> None:
        if inbox.has_ended:
            end_process(0)  # loading cannot be interrupted in any other way

    inbox.on_arrival = leave_if_abandoned
    leave_if_abandoned()
    heartbeat = Heartbeat(lambda: outbox.send(Alive()), beat_interval_s(first.engine_timeout_s))
    opened = open_engine(first, lambda stage, fraction: outbox.send(Progress(stage, fraction)))
    quiet_garbage_collector()
    watch = StepWatch(
        opened.info.cost_model,
        first.engine_timeout_s,
        opened.engine.clock.now(),
        first_s=0.0 if opened.info.device == "cpu" else COMPILING_S,
    )
    loop = Loop(opened.engine, inbox, outbox, opened.lengths)
    opened.engine.observers += (watch,)
    loop.on_turn = watch.turned
    heartbeat.overdue = lambda: watch.overdue(opened.engine.clock.now())
    heartbeat.on_hang = lambda hang: _end_at(hang, loop, outbox)
    outbox.send(Ready(opened.info))
    return loop, heartbeat


def _end_at(hang: Hang, loop: Loop, outbox: Outbox) -> NoReturn:
    """End the process from another thread: the loop does not get on, and never may."""
    logger.critical("%s; the process ends where its threads are:", hang.what)
    for line in where_threads_are():
        logger.critical("%s", line)
    outbox.send(Failed(hang.what, running=loop.numbers_of(hang.handles)))
    outbox.close(LAST_WORDS_S)
    end_process(1)
