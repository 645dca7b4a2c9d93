"""One engine process as the API process holds it: what it was given, and what it has said.

Rules: a link lives as long as its process; a process that is started in its place gets a link of
its own. It hears a request's commands only if it was given the request. What it says of itself
(progress, figures, why it fails) is kept here; what it says of requests is passed on.
Must not know: streams, why a request is given to it, when it is replaced.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import time
from collections.abc import AsyncGenerator, Mapping, Sequence

from fastserve.wire.child import Child
from fastserve.wire.engine_messages import (
    Abort,
    Add,
    Configure,
    EngineInfo,
    EngineStats,
    Event,
    Failed,
    Finish,
    Progress,
    Ready,
    RequestNumber,
    Updates,
    decode_event,
)
from fastserve.wire.frames import encode_frame

logger = logging.getLogger(__name__)

STARTING = ("starting", 0.0)
LOADED = ("ready", 1.0)


class EngineLink:
    """A started engine process; `replica` says which, where several serve, and `name` in words."""

    def __init__(self, child: Child[Event], replica: int = 0, name: str = "engine") -> None:
        self.replica = replica
        self.heard_at = time.monotonic()  # when it last said anything
        self.ready_at: float | None = None  # when it was loaded
        self.progress = STARTING
        self.info: EngineInfo | None = None  # what it said when it was loaded
        self.stats: EngineStats | None = None  # the latest snapshot; `at` says how old it is
        self.failure: Failed | None = None  # what it said of its own end
        self.is_serving = False
        self._child = child
        self.name = name
        self._fault: str | None = None  # why it was killed
        self._given: set[RequestNumber] = set()  # requests that have not ended

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        environment: Mapping[str, str],
        configure: Configure,
    ) -> EngineLink:
        """Start a process, and let it load what the message says.

        Raises OSError where this machine has no process or descriptor left.
        """
        replica = configure.replica
        name = "engine" if configure.config.data_parallel_size == 1 else f"engine {replica}"
        link = cls(await Child.start(command, environment, decode_event, name), replica, name)
        link._child.send(encode_frame(configure))
        return link

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process."""
        return self._child.process

    def give(self, add: Add) -> None:
        """Hand over a request, or what is left of it, and its siblings."""
        self._child.send(encode_frame(add))
        self._given.update(add.numbers)

    def has(self, number: RequestNumber) -> bool:
        """Whether it was given a request that has not ended."""
        return number in self._given

    def tell(self, command: Abort | Finish) -> None:
        """Say something of a request, if it was given it and still serves."""
        if self.is_serving and self.has(command.number):
            self._child.send(encode_frame(command))

    def forget(self, number: RequestNumber) -> None:
        """Take note that a request has ended."""
        self._given.discard(number)

    def present_at_death(self) -> list[RequestNumber]:
        """Return the requests whose step was under way; all it had, where it did not say which."""
        running = self.failure.running if self.failure is not None else ()
        return sorted(self._given.intersection(running) if running else self._given)

    async def events(self) -> AsyncGenerator[Event]:
        """Yield what it says, each after it was taken note of here, until its connection ends."""
        try:
            async with contextlib.aclosing(self._child.events()) as events:
                async for event in events:
                    self._note(event)
                    yield event
        except ValueError as error:
            fault = f"the {self.name} process cannot be understood: {error}"
            logger.error("%s; it is killed", fault)
            self.kill(fault)

    def _note(self, event: Event) -> None:
        self.heard_at = time.monotonic()
        if isinstance(event, Updates):
            self.stats = event.stats or self.stats
        elif isinstance(event, Progress):
            if event.stage != self.progress[0]:
                logger.info("%s: %s", self.name, event.stage)
            self.progress = (event.stage, event.fraction)
        elif isinstance(event, Ready):
            self.info, self.progress = event.info, LOADED
            self.ready_at = self.heard_at
            self.is_serving = True
        elif isinstance(event, Failed):
            self.failure = event

    def close(self) -> None:
        """Ask the process to leave; its connection ends when it has."""
        self._child.close()

    def kill(self, fault: str | None = None) -> None:
        """End the process at once, whatever it is at; `fault` says in one line why."""
        self._fault = fault
        self.is_serving = False
        self._child.process.kill()

    @property
    def served_s(self) -> float:
        """The seconds in which it served, as far as it was heard."""
        return 0.0 if self.ready_at is None else self.heard_at - self.ready_at

    async def end(self) -> str:
        """Wait until the process is gone, and return in one line why."""
        self.is_serving = False
        self.progress = STARTING  # of the next one
        self._child.close()
        cause = await self._child.cause_of_death()
        if self.failure is not None:
            return self.failure.message
        return cause if self._fault is None else self._fault
