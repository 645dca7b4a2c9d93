"""Keeps an engine process running: starts it, hears it, replaces one that died.

Rules: a process that never served is not replaced, for the next would fail in the same way; others
are, a bounded number of times within a window. Deaths that were one request's fault do not count.
One that says nothing for too long is killed, so that what it has goes on in another and nothing is
done twice; that one lives but hangs it finds out itself (engine/step_watch.py). Where this machine
has no descriptor or process left for the next one, that is tried again for a while. Each of several
replicas has a supervisor of its own.
Must not know: what a request is, how the blame for a death is found.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable

from fastserve.client.dispatch import Dispatcher
from fastserve.client.engine_link import STARTING, EngineLink
from fastserve.client.interfaces import EngineDeadError
from fastserve.client.metrics import EngineMetrics
from fastserve.settings.server import ENGINE_TIMEOUT_S
from fastserve.wire.engine_messages import EngineInfo, EngineStats, Ready, beat_interval_s

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
RESTART_WINDOW_S = 60.0
LOADING_SILENCE_S = 60.0
"""How long a process may say nothing while it imports and loads, when long calls keep its
heartbeat waiting."""
START_RETRY_S = 1.0
START_TRIES = 30
CLOSED = "the engine was closed"


class Restarts:
    """How often a process may be replaced: MAX_RESTARTS times within a window of service.

    Loading is no service, and what a hang takes to be noticed, as often as that may be, is allowed
    for: a process that does nothing else than load and hang is given up.
    """

    def __init__(self, engine_timeout_s: float = 0.0) -> None:
        self._window_s = RESTART_WINDOW_S + MAX_RESTARTS * engine_timeout_s
        self._times: deque[float] = deque()

    def allow(self, now: float) -> bool:
        """Return whether one more is within bounds, and count it if so; `now`: seconds served."""
        while self._times and self._times[0] < now - self._window_s:
            self._times.popleft()
        if len(self._times) >= MAX_RESTARTS:
            return False
        self._times.append(now)
        return True

    def clear(self) -> None:
        """Forget those so far: what caused them is gone."""
        self._times.clear()


class Supervisor:
    """Runs the engine processes of a replica, one at a time, until one may not be replaced."""

    def __init__(
        self,
        start_process: Callable[[], Awaitable[EngineLink]],
        dispatcher: Dispatcher,
        metrics: EngineMetrics,
        *,
        replica: int = 0,
        engine_timeout_s: float = ENGINE_TIMEOUT_S,
    ) -> None:
        self.link: EngineLink | None = None  # the latest
        self.info: EngineInfo | None = None  # of the latest that served
        self.error: str | None = None
        self._start_process = start_process
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._replica = replica
        self._engine_timeout_s = engine_timeout_s
        self._restarts = Restarts(engine_timeout_s)
        self._served_s = 0.0  # by all processes that have ended
        self._num_blamed = 0  # deaths of any replica, as of the latest one here
        self._closing = asyncio.Event()
        self._settled = asyncio.Event()  # serving, or given up
        self._task: asyncio.Task[None] | None = None

    @property
    def progress(self) -> tuple[str, float]:
        """What loading is at, and how much of that is done (0 to 1)."""
        return STARTING if self.link is None else self.link.progress

    @property
    def stats(self) -> EngineStats | None:
        """The latest snapshot of the process that runs; None until it has sent one."""
        return None if self.link is None else self.link.stats

    @property
    def is_serving(self) -> bool:
        """Whether a process is there and loaded."""
        return self.link is not None and self.link.is_serving

    @property
    def is_misconfigured(self) -> bool:
        """Whether the last process ended because its settings cannot be honoured."""
        failure = None if self.link is None else self.link.failure
        return failure is not None and failure.is_misconfiguration

    def start(self) -> None:
        """Start the first process and return at once; `ready` waits for it."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="engine-supervisor")

    async def ready(self) -> EngineInfo:
        """Wait until a process serves; EngineDeadError if none ever will."""
        await self._settled.wait()
        if self.error is not None:
            raise EngineDeadError(self.error)
        assert self.info is not None
        return self.info

    async def over(self) -> None:
        """Wait until no process is there and none will be: given up, or closed."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def close(self) -> None:
        """Stop the process; what becomes of its requests is the caller's to say."""
        self._closing.set()
        if self.link is not None:
            self.link.close()
        if self._task is not None:
            await self._task
        self._settle(CLOSED)

    def kill(self) -> None:
        """End the process at once; `close` follows."""
        self._closing.set()
        if self.link is not None:
            self.link.kill()

    async def _run(self) -> None:
        try:
            while not self._closing.is_set():
                reason = await self._run_process()
                if self._closing.is_set():
                    return
                if not self._may_go_on(reason):
                    self._give_up(reason)
                    return
                logger.warning(
                    "%s; starting it again, %d requests go on",
                    reason,
                    len(self._dispatcher.streams),
                )
                self._settled.clear()
                self._metrics.restarted()
        except EngineDeadError as error:
            self._give_up(str(error))
        except Exception as error:
            logger.exception("the supervisor of the engine failed")
            self._give_up(f"the engine could not be run: {error}")

    async def _run_process(self) -> str:
        """Start one engine process, serve until it ends, and return why in one line."""
        link = await self._start()
        if link is None:
            return CLOSED
        self.link = link
        watcher = asyncio.create_task(watch(link, self._engine_timeout_s))
        try:
            if self._closing.is_set():
                link.close()
            async with contextlib.aclosing(link.events()) as events:
                async for event in events:
                    if isinstance(event, Ready):
                        self.info = event.info
                        self._dispatcher.begin(link, event.info)
                        self._settled.set()
                    else:
                        self._dispatcher.receive(event, self._replica)
        finally:
            watcher.cancel()
            reason = await link.end()
            self._served_s += link.served_s
        return reason

    async def _start(self) -> EngineLink | None:
        """Start a process; where none can be, try again for a while. None: closed meanwhile.

        Raises EngineDeadError where there is nothing to run it with on this machine.
        """
        for num_left in reversed(range(START_TRIES)):
            try:
                return await self._start_process()
            except OSError as error:
                reason = f"the engine process cannot be started: {error.strerror or error}"
                if self.info is None or not num_left:  # the first has no streams to save
                    raise EngineDeadError(reason) from error
                if num_left == START_TRIES - 1:
                    logger.error("%s; trying for %.0f s", reason, START_TRIES * START_RETRY_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), START_RETRY_S)
                return None
        raise AssertionError("the last try raises")

    def _may_go_on(self, reason: str) -> bool:
        """Take note of the latest death; return whether another process may be started."""
        assert self.link is not None
        self._dispatcher.lost(self.link, reason)
        if self._dispatcher.num_blamed > self._num_blamed:
            self._num_blamed = self._dispatcher.num_blamed
            self._restarts.clear()
        return self.info is not None and self._restarts.allow(self._served_s)

    def _give_up(self, reason: str) -> None:
        self._settle(reason)
        self._dispatcher.give_up(self._replica, reason)

    def _settle(self, error: str) -> None:
        """Let nobody wait any more; the first reason is the one that counts."""
        if self.error is None:
            self.error = error
        self._settled.set()


async def watch(link: EngineLink, engine_timeout_s: float) -> None:
    """Kill a process that has not said anything for so long; while it loads it has more time.

    Looks are counted, not seconds: where this process was stopped itself, it hears first what was
    said meanwhile.
    """
    interval_s = beat_interval_s(engine_timeout_s)
    num_silent, heard_at, limit_s = 0, link.heard_at, math.inf
    while num_silent * interval_s < limit_s:
        await asyncio.sleep(interval_s)
        num_silent = num_silent + 1 if link.heard_at == heard_at else 0
        heard_at = link.heard_at
        limit_s = max(engine_timeout_s, 0.0 if link.is_serving else LOADING_SILENCE_S)
    fault = f"the {link.name} process said nothing for {num_silent * interval_s:.0f} s"
    logger.error("%s, and is killed", fault)
    link.kill(fault)
