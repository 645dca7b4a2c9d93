"""The engine of a server: its parts put together, and their state in one place.

One supervisor keeps one engine process running; the dispatcher and its streams would serve several.
Rules: everything here runs on one event loop. Must not know: torch, text, HTTP, how to schedule.
"""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
from collections.abc import Mapping, Sequence

from fastserve.client.dispatch import Dispatcher
from fastserve.client.engine_link import EngineLink
from fastserve.client.interfaces import EngineDeadError
from fastserve.client.metrics import EngineMetrics
from fastserve.client.streams import RequestStream
from fastserve.client.supervisor import Supervisor
from fastserve.core.request import Arrival
from fastserve.settings.engine import EngineConfig
from fastserve.wire.engine_messages import EngineInfo, EngineStats, checked


class AsyncEngine:
    """An engine in a process of its own; fits `EngineClient`.

    `command` starts it; the number of an inherited socket is appended.
    """

    def __init__(
        self,
        config: EngineConfig,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        model_name: str | None = None,
    ) -> None:
        self.config = config
        self.metrics = EngineMetrics(model_name or config.model)
        self._command = tuple(command)
        self._environment = {**os.environ, **(environment or {})}
        self._seeds = random.Random(config.seed)
        self._dispatcher = Dispatcher(self.metrics)
        self._supervisor = Supervisor(self._start_process, self._dispatcher, self.metrics)

    async def _start_process(self) -> EngineLink:
        return await EngineLink.start(self._command, self._environment, self.config)

    @property
    def info(self) -> EngineInfo | None:
        """What the engine is; None until it was loaded once."""
        return self._supervisor.info

    @property
    def stats(self) -> EngineStats | None:
        """The latest snapshot of the process that runs; None until it has sent one."""
        return self._supervisor.stats

    @property
    def progress(self) -> tuple[str, float]:
        """What loading is at, and how much of that is done (0 to 1)."""
        return self._supervisor.progress

    @property
    def error(self) -> str | None:
        """Why the engine is gone for good, in one line; None while it is not."""
        return self._supervisor.error

    @property
    def is_misconfigured(self) -> bool:
        """Whether the error is of the settings, and nothing but other settings will help."""
        return self._supervisor.is_misconfigured

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The latest engine process."""
        link = self._supervisor.link
        return None if link is None else link.process

    @property
    def is_ready(self) -> bool:
        """Whether requests are run at this moment; False while loading and while restarting."""
        return self._supervisor.is_serving

    @property
    def is_dead(self) -> bool:
        """Whether the engine is gone for good; `error` says why."""
        return self.error is not None

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._dispatcher.streams)

    async def start(self) -> None:
        """Start the engine process and return at once; `ready` waits for it."""
        self._supervisor.start()

    async def ready(self) -> EngineInfo:
        """Wait until the engine is loaded; EngineDeadError if it never will be."""
        return await self._supervisor.ready()

    async def idle(self) -> None:
        """Wait until no request is left."""
        await self._dispatcher.streams.idle()

    def submit(self, arrival: Arrival) -> RequestStream:
        """Accept one request; ValueError if its values cannot be sent, EngineDeadError if dead.

        That it can never run (no room for it) is found later: its stream then raises ValueError.
        """
        if self.error is not None:
            raise EngineDeadError(self.error)
        if arrival.params.seed is None:
            params = dataclasses.replace(arrival.params, seed=self._seeds.getrandbits(63))
            arrival = dataclasses.replace(arrival, params=params)
        # The engine would refuse a wrong type by ending; so it is refused before it is sent.
        return self._dispatcher.submit(checked(arrival))

    async def close(self) -> None:
        """Stop the engine process; streams still open raise EngineDeadError."""
        await self._supervisor.close()

    def kill(self) -> None:
        """End the engine process at once, whatever it is at; `close` follows."""
        self._supervisor.kill()
