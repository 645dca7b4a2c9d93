"""Keeps an engine process running: starts it, hears it, replaces one that died.

Rules: a process that never served is not replaced, for the next would fail in the same way; others
are, a bounded number of times within a window. Deaths that were one request's fault do not count.
Each of several replicas has a supervisor of its own; one that says nothing for SILENCE_CHECKS
checks in a row is killed, so that what it has goes on elsewhere and nothing is done twice.
Must not know: what a request is, how the blame for a death is found.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable

from fastserve.client.dispatch import Dispatcher
from fastserve.client.engine_link import STARTING, EngineLink
from fastserve.client.interfaces import EngineDeadError
from fastserve.client.metrics import EngineMetrics
from fastserve.wire.engine_messages import EngineInfo, EngineStats, Ready

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
RESTART_WINDOW_S = 60.0
CHECK_S = 1.0  # between two looks at whether a replica has said anything
SILENCE_CHECKS = 5
CLOSED = "the engine was closed"


class Restarts:
    """How often a process may be replaced: MAX_RESTARTS times within RESTART_WINDOW_S."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def allow(self, now: float) -> bool:
        """Return whether one more is within bounds, and count it if so; `now` in seconds."""
        while self._times and self._times[0] < now - RESTART_WINDOW_S:
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
        is_watched: bool = False,
    ) -> None:
        """A process `is_watched` for silence where there are others to do its work."""
        self.link: EngineLink | None = None  # the latest
        self.info: EngineInfo | None = None  # of the latest that served
        self.error: str | None = None
        self._start_process = start_process
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._replica = replica
        self._is_watched = is_watched
        self._restarts = Restarts()
        self._num_blamed = 0  # deaths of any replica, as of the latest one here
        self._is_closing = False
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

    async def close(self) -> None:
        """Stop the process; what becomes of its requests is the caller's to say."""
        self._is_closing = True
        if self.link is not None:
            self.link.close()
        if self._task is not None:
            await self._task
        self._settle(CLOSED)

    def kill(self) -> None:
        """End the process at once; `close` follows."""
        self._is_closing = True
        if self.link is not None:
            self.link.kill()

    async def _run(self) -> None:
        try:
            while not self._is_closing:
                reason = await self._run_process()
                if self._is_closing:
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
        except Exception as error:
            logger.exception("the supervisor of the engine failed")
            self._give_up(f"the engine could not be run: {error}")

    async def _run_process(self) -> str:
        """Start one engine process, serve until it ends, and return why in one line."""
        self.link = link = await self._start_process()
        watcher = asyncio.create_task(watch(link)) if self._is_watched else None
        try:
            if self._is_closing:
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
            if watcher is not None:
                watcher.cancel()
            reason = await link.end()
        return reason

    def _may_go_on(self, reason: str) -> bool:
        """Take note of the latest death; return whether another process may be started."""
        assert self.link is not None
        self._dispatcher.lost(self.link, reason)
        if self._dispatcher.num_blamed > self._num_blamed:
            self._num_blamed = self._dispatcher.num_blamed
            self._restarts.clear()
        return self.info is not None and self._restarts.allow(time.monotonic())

    def _give_up(self, reason: str) -> None:
        self._settle(reason)
        self._dispatcher.give_up(self._replica, reason)

    def _settle(self, error: str) -> None:
        """Let nobody wait any more; the first reason is the one that counts."""
        if self.error is None:
            self.error = error
        self._settled.set()


async def watch(link: EngineLink) -> None:
    """Kill a process that serves and has not said anything at SILENCE_CHECKS looks in a row.

    Looks are counted, not seconds: where this process was stopped itself, it hears first what was
    said meanwhile.
    """
    num_silent, heard_at = 0, link.heard_at
    while num_silent < SILENCE_CHECKS:
        await asyncio.sleep(CHECK_S)
        is_silent = link.is_serving and link.heard_at == heard_at
        num_silent = num_silent + 1 if is_silent else 0
        heard_at = link.heard_at
    logger.error(
        "replica %d has said nothing for %.0f s and is killed",
        link.replica,
        time.monotonic() - heard_at,
    )
    link.kill()
