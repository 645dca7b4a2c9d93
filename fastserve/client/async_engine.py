"""The engine of a server: its parts put together, and their state in one place.

Each replica is an engine process with a supervisor that keeps it running; one dispatcher and its
streams serve them all. Rules: everything here runs on one event loop; what is there once one
replica serves is there. Must not know: torch, text, HTTP, how to schedule.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial

import msgspec

from fastserve.client.dispatch import Dispatcher
from fastserve.client.engine_link import EngineLink
from fastserve.client.interfaces import EngineDeadError, ShuttingDownError
from fastserve.client.metrics import EngineMetrics
from fastserve.client.replica_metrics import ReplicaMetrics
from fastserve.client.streams import RequestStream
from fastserve.client.supervisor import CLOSED, Supervisor
from fastserve.core.request import Arrival
from fastserve.settings.engine import EngineConfig
from fastserve.settings.server import ENGINE_TIMEOUT_S
from fastserve.wire.engine_messages import Configure, EngineInfo, EngineStats, checked


class AsyncEngine:
    """`data_parallel_size` engines, each in a process of its own; fits `EngineClient`.

    `command` starts one; the number of an inherited socket is appended. `replica_environments` say
    what each finds in its environment beside `environment`.
    """

    def __init__(
        self,
        config: EngineConfig,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        replica_environments: Sequence[Mapping[str, str]] = (),
        model_name: str | None = None,
        engine_timeout_s: float = ENGINE_TIMEOUT_S,
    ) -> None:
        self.config = config
        self._command = tuple(command)
        self._environment = {**os.environ, **(environment or {})}
        self._replica_environments = replica_environments
        self._engine_timeout_s = engine_timeout_s
        self._seeds = random.Random(config.seed)
        name, num_replicas = model_name or config.model, config.data_parallel_size
        engine_metrics = [EngineMetrics(name, replica) for replica in range(num_replicas)]
        self.metrics = ReplicaMetrics(name, engine_metrics, lambda: self.num_serving)
        self._dispatcher = Dispatcher(*engine_metrics)
        self.replicas = tuple(
            Supervisor(
                partial(self._start_process, replica),
                self._dispatcher,
                engine_metrics[replica],
                replica=replica,
                engine_timeout_s=engine_timeout_s,
            )
            for replica in range(num_replicas)
        )

    async def _start_process(self, replica: int) -> EngineLink:
        environment = dict(self._environment)
        if self._replica_environments:
            environment |= self._replica_environments[replica]
        configure = Configure(
            replica_config(self.config, replica),
            replica,
            self._engine_timeout_s,
            is_restart=self.replicas[replica].info is not None,
        )
        return await EngineLink.start(self._command, environment, configure)

    @property
    def info(self) -> EngineInfo | None:
        """What the engine is; None until one replica was loaded once.

        They may differ in memory: what fits one of them must fit all, for it may move.
        """
        infos = [replica.info for replica in self.replicas if replica.info is not None]
        if not infos:
            return None
        least = min(info.max_request_tokens for info in infos)
        return msgspec.structs.replace(infos[0], max_request_tokens=least)

    @property
    def stats(self) -> EngineStats | None:
        """The latest snapshot of the first replica's process; None until it has sent one."""
        return self.replicas[0].stats

    @property
    def progress(self) -> tuple[str, float]:
        """What loading is at, and how much of that is done (0 to 1), in the first replica."""
        return self.replicas[0].progress

    @property
    def error(self) -> str | None:
        """Why every replica is gone for good, in one line: the first one's reason."""
        errors = [replica.error for replica in self.replicas]
        return errors[0] if all(error is not None for error in errors) else None

    @property
    def is_misconfigured(self) -> bool:
        """Whether the error is of the settings, and nothing but other settings will help."""
        return self.replicas[0].is_misconfigured

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The latest process of the first replica."""
        link = self.replicas[0].link
        return None if link is None else link.process

    @property
    def num_serving(self) -> int:
        """Replicas that run requests at this moment."""
        return sum(replica.is_serving for replica in self.replicas)

    @property
    def is_ready(self) -> bool:
        """Whether requests are run at this moment; False while loading and while restarting."""
        return self.num_serving > 0

    @property
    def is_dead(self) -> bool:
        """Whether the engine is gone for good; `error` says why."""
        return self.error is not None

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._dispatcher.streams)

    async def start(self) -> None:
        """Start the engine processes and return at once; `ready` waits for the first."""
        for replica in self.replicas:
            replica.start()

    async def ready(self) -> EngineInfo:
        """Wait until one replica is loaded; EngineDeadError if none ever will be."""
        waiting = {asyncio.ensure_future(replica.ready()) for replica in self.replicas}
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if any(task.exception() is None for task in done):
                    assert self.info is not None
                    return self.info
        finally:
            for task in waiting:
                task.cancel()
        assert self.error is not None
        raise EngineDeadError(self.error)

    async def idle(self) -> None:
        """Wait until no request is left."""
        await self._dispatcher.streams.idle()

    async def over(self) -> None:
        """Wait until every replica is gone for good, or closed."""
        await asyncio.gather(*(replica.over() for replica in self.replicas))

    def end_requests(self) -> None:
        """End all that have not ended: their streams raise ShuttingDownError."""
        self._dispatcher.end_all("The server is shutting down.", ShuttingDownError)

    def submit(self, arrival: Arrival) -> RequestStream:
        """Accept one request, as `submit_choices` does."""
        (stream,) = self.submit_choices(arrival, 1)
        return stream

    def submit_choices(self, arrival: Arrival, n: int) -> list[RequestStream]:
        """Accept `n` choices of a prompt: `arrival` is the first (`SamplingParams.of_choice`).

        ValueError if its values cannot be sent, EngineDeadError if the engine is dead. That one
        can never run (no room for it) is found later: its stream then raises ValueError.
        """
        if self.error is not None:
            raise EngineDeadError(self.error)
        if arrival.params.seed is None:
            params = dataclasses.replace(arrival.params, seed=self._seeds.getrandbits(63))
            arrival = dataclasses.replace(arrival, params=params)
        # The engine would refuse a wrong type by ending; so it is refused before it is sent.
        first = checked(arrival)
        return self._dispatcher.submit_choices(
            dataclasses.replace(first, params=first.params.of_choice(index)) for index in range(n)
        )

    async def close(self) -> None:
        """Stop the engine processes; streams still open raise EngineDeadError."""
        await asyncio.gather(*(replica.close() for replica in self.replicas))
        self._dispatcher.end_all(CLOSED)

    def kill(self) -> None:
        """End the engine processes at once, whatever they are at; `close` follows."""
        for replica in self.replicas:
            replica.kill()


def replica_config(config: EngineConfig, replica: int) -> EngineConfig:
    """Return what a replica is to load: of several, each writes a journal of its own."""
    if config.journal is None or config.data_parallel_size == 1:
        return config
    return dataclasses.replace(config, journal=f"{config.journal}.{replica}")
