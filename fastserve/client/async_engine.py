"""The API process' side of the engine: starts its process, streams its news, survives its death.

Rules: every accepted request is kept here, its prompt and the ids so far, until its terminal event.
When the engine process dies it is started again, a bounded number of times, and the requests go on
from those ids: sampling is seeded by (seed, position), so they go on as if nothing had happened. A
request that kills every process it runs in is found (suspects.py) and ends alone.
Everything here runs on one event loop. Must not know: torch, text, HTTP, how to schedule.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import random
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence

from fastserve.client.metrics import EngineMetrics
from fastserve.client.streams import RequestStream
from fastserve.client.suspects import DEATHS_OF_A_SUSPECT, Suspects
from fastserve.core.messages import RequestFailedError, RequestUpdate, Sample
from fastserve.core.request import Arrival, FinishReason
from fastserve.settings.engine import EngineConfig
from fastserve.wire.child import Child
from fastserve.wire.engine_messages import (
    Abort,
    Configure,
    EngineInfo,
    EngineStats,
    Event,
    Failed,
    Finish,
    Progress,
    Ready,
    Rejected,
    Updates,
    checked,
    decode_event,
)
from fastserve.wire.frames import encode_frame

__all__ = ["AsyncEngine", "EngineDeadError", "RequestFailedError", "RequestStream"]

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
RESTART_WINDOW_S = 60.0


class EngineDeadError(RuntimeError):
    """The engine process is gone and will not be started again; the message is one line."""


class AsyncEngine:
    """An engine in a process of its own.

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
        self.info: EngineInfo | None = None
        self.stats: EngineStats | None = None
        self.progress: tuple[str, float] = ("starting", 0.0)
        self.error: str | None = None
        self.is_misconfigured = False  # the error is of the settings, and nothing else will help
        self.metrics = EngineMetrics(model_name or config.model)
        self._command = tuple(command)
        self._environment = {**os.environ, **(environment or {})}
        self._is_serving = False
        self._is_closing = False
        self._settled = asyncio.Event()  # ready, or dead
        self._streams: dict[int, RequestStream] = {}
        self._given: set[int] = set()  # of these, those that the process has been sent
        self._all_ended = asyncio.Event()  # no stream is open
        self._all_ended.set()
        self._next_request = 0
        self._child: Child[Event] | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._restarts: deque[float] = deque()
        self._failure: Failed | None = None  # what the process said of its own end
        self._suspects = Suspects()
        self._seeds = random.Random(config.seed)

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The latest engine process."""
        return None if self._child is None else self._child.process

    @property
    def is_ready(self) -> bool:
        """Whether requests are run now; False while loading and while restarting."""
        return self._is_serving

    @property
    def is_dead(self) -> bool:
        """Whether the engine is gone for good; `error` says why."""
        return self.error is not None

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def start(self) -> None:
        """Start the engine process and return at once; `ready` waits for it."""
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def ready(self) -> EngineInfo:
        """Wait until the engine is loaded; EngineDeadError if it never will be."""
        await self._settled.wait()
        if self.error is not None:
            raise EngineDeadError(self.error)
        assert self.info is not None
        return self.info

    async def idle(self) -> None:
        """Wait until no request is left."""
        await self._all_ended.wait()

    def submit(self, arrival: Arrival) -> RequestStream:
        """Accept one request; ValueError if its values are not what the wire carries.

        That it can never run (no room for it) is found by the engine: its stream then raises
        ValueError.
        """
        if self.error is not None:
            raise EngineDeadError(self.error)
        if arrival.params.seed is None:
            params = dataclasses.replace(arrival.params, seed=self._seeds.getrandbits(63))
            arrival = dataclasses.replace(arrival, params=params)
        # The engine would refuse a wrong type by ending; so it is refused here, and harms nobody.
        stream = RequestStream(self, self._next_request, checked(arrival), time.monotonic())
        self._next_request += 1
        self._streams[stream.request_id] = stream
        self._all_ended.clear()
        self._give(stream)
        return stream

    def tell(self, command: Abort | Finish) -> None:
        """Say something of a request that the engine has; others it will not hear of at all."""
        if self._is_serving and self._child is not None and command.request in self._given:
            self._child.send(encode_frame(command))

    def _give(self, stream: RequestStream) -> None:
        """Send a request's Add, if there is an engine and the request may run now."""
        may_run = self._suspects.on_trial in (None, stream.request_id)
        if self._is_serving and self._child is not None and may_run:
            self._child.send(encode_frame(stream.as_command(time.monotonic())))
            self._given.add(stream.request_id)

    def drop(self, stream: RequestStream) -> None:
        """Forget a stream whose client has left."""
        if self._remove(stream.request_id) is not None:
            self._count_end(stream, FinishReason.ABORT, None)
            stream.end()

    def _remove(self, request: int) -> RequestStream | None:
        stream = self._streams.pop(request, None)
        if not self._streams:
            self._all_ended.set()
        self._given.discard(request)
        self._clear(request)
        return stream

    async def close(self) -> None:
        """Stop the engine process; streams still open raise EngineDeadError."""
        self._is_closing = True
        if self._child is not None:
            self._child.close()
        if self._supervisor is not None:
            await self._supervisor
        self._die("the engine was closed")

    def kill(self) -> None:
        """End the engine process at once, whatever it is at; `close` follows."""
        self._is_closing = True
        if self._child is not None:
            self._child.process.kill()

    # ── the process ──────────────────────────────────────────────────────────────────────────

    async def _supervise(self) -> None:
        """Run engine processes until one may not be replaced."""
        try:
            while not self._is_closing:
                reason = await self._run_process()
                if self._is_closing:
                    return
                self._charge(reason)
                if not self._may_restart():
                    self._die(reason)
                    return
                logger.warning(
                    "%s; starting it again, %d requests go on", reason, len(self._streams)
                )
                self._settled.clear()
                self.metrics.restarted()
        except Exception as error:
            logger.exception("the supervisor of the engine failed")
            self._die(f"the engine could not be run: {error}")

    def _may_restart(self) -> bool:
        if self.info is None:  # it never served: it would fail in the same way
            return False
        now = time.monotonic()
        while self._restarts and self._restarts[0] < now - RESTART_WINDOW_S:
            self._restarts.popleft()
        if len(self._restarts) >= MAX_RESTARTS:
            return False
        self._restarts.append(now)
        return True

    async def _run_process(self) -> str:
        """Start one engine process, serve until it ends, and return why in one line."""
        self._failure = None
        self._given.clear()
        self.progress = ("starting", 0.0)
        self._child = child = await Child.start(
            self._command, self._environment, decode_event, "engine"
        )
        try:
            child.send(encode_frame(Configure(self.config)))
            if self._is_closing:
                child.close()
            async with contextlib.aclosing(child.events()) as events:
                async for event in events:
                    self._receive(event)
        finally:
            self._is_serving = False
            child.close()
            cause = await child.cause_of_death()
        return cause if self._failure is None else self._failure.message

    def _receive(self, event: Event) -> None:
        if isinstance(event, Updates):
            for update in event.updates:
                self._update(update)
            if event.stats is not None:
                self.stats = event.stats
                self.metrics.snapshot(event.stats)
        elif isinstance(event, Progress):
            if event.stage != self.progress[0]:
                logger.info("engine: %s", event.stage)
            self.progress = (event.stage, event.fraction)
        elif isinstance(event, Ready):
            self._serve(event.info)
        elif isinstance(event, Rejected):
            stream = self._remove(event.request)
            if stream is not None:
                self._count_end(stream, FinishReason.ERROR, None)
                stream.end(ValueError(event.message))
        elif isinstance(event, Failed):
            self._failure = event
            self.is_misconfigured = event.is_misconfiguration

    def _serve(self, info: EngineInfo) -> None:
        """Hand every open request to an engine that has just loaded."""
        self.info = info
        self.progress = ("ready", 1.0)
        self.metrics.loaded(info)
        self._is_serving = True
        self._suspects.begin_trials()
        self._go_on()
        self._settled.set()

    def _go_on(self) -> None:
        """Hand over the streams that the engine has not heard of, as far as they may run now."""
        for stream in list(self._streams.values()):
            request = stream.request_id
            if request in self._given or self._suspects.on_trial not in (None, request):
                continue
            if stream.finish_at is not None:  # its text is complete: only the word of it was lost
                self._update(RequestUpdate(request, (), FinishReason.STOP))
                continue
            stream.num_to_skip = stream.num_prompt_logprobs
            self._give(stream)

    # ── requests that kill the engine ────────────────────────────────────────────────────────

    def _charge(self, reason: str) -> None:
        """Find who was present at the death of the engine; end the one who is to blame."""
        said = self._failure.running if self._failure is not None else ()
        present = sorted(self._given.intersection(said) if said else self._given)
        culprit = self._suspects.charge(present)
        stream = None if culprit is None else self._remove(culprit)
        if stream is None:
            return
        logger.error("a request ended the engine %d times; it is given up", DEATHS_OF_A_SUSPECT)
        self._restarts.clear()  # what it cost is not the others' fault
        self._count_end(stream, FinishReason.ERROR, None)
        stream.end(RequestFailedError(f"This request cannot be run: {reason}."))

    def _clear(self, request: int) -> None:
        """Let the next suspect run, or everybody, once this one is past its trial."""
        if self._suspects.clear(request) and self._is_serving:
            self._go_on()

    def _die(self, reason: str) -> None:
        if self.error is None:
            self.error = reason
        self._is_serving = False
        for stream in list(self._streams.values()):
            self._remove(stream.request_id)
            self._count_end(stream, FinishReason.ERROR, None)
            stream.end(EngineDeadError(reason))
        self._settled.set()

    # ── the news ─────────────────────────────────────────────────────────────────────────────

    def _update(self, update: RequestUpdate) -> None:
        stream = self._streams.get(update.request)
        if stream is None:  # it was aborted while the news was on its way
            return
        if update.prompt_logprobs:
            update = _unseen(stream, update)
        if update.samples:
            self._count_tokens(stream, update.samples)
        stream.push(update)
        if update.samples:
            self._clear(update.request)
        if update.finish_reason is not None:
            self._remove(update.request)
            self._count_end(stream, update.finish_reason, update)

    def _count_tokens(self, stream: RequestStream, samples: Sequence[Sample]) -> None:
        now = time.monotonic()
        self.metrics.generated(len(samples))
        if stream.first_token_at is None:
            stream.first_token_at = now
            self.metrics.first_token(len(stream.prompt_token_ids), now - stream.arrived_at)
        else:
            self.metrics.next_tokens(len(samples), now - stream.last_token_at)
        stream.last_token_at = now

    def _count_end(
        self, stream: RequestStream, reason: FinishReason, update: RequestUpdate | None
    ) -> None:
        self.metrics.finished(
            reason,
            len(stream.prompt_token_ids),
            len(stream.output_token_ids),
            time.monotonic() - stream.arrived_at,
            update.metrics if update is not None else None,
            stream.params,
        )


def _unseen(stream: RequestStream, update: RequestUpdate) -> RequestUpdate:
    """Leave out the prompt logprobs that an engine before this one has sent already."""
    skipped = min(stream.num_to_skip, len(update.prompt_logprobs))
    stream.num_to_skip -= skipped
    entries = update.prompt_logprobs[skipped:]
    stream.num_prompt_logprobs += len(entries)
    return update._replace(prompt_logprobs=entries)
