"""Decides which open request an engine process is given, and takes in what comes of it.

Rules: a process that has loaded is given every open request it has not heard of; requests go on
from their ids so far, as if nothing had happened, because sampling is seeded by (seed, position).
After a death the suspects (suspects.py) run before all others, one at a time, and a request that
ends every process it runs in ends alone. There is one dispatcher, however many engines there are:
with several, to choose one is decided here.
Must not know: how a process is started and when it is replaced, text, HTTP.
"""

from __future__ import annotations

import logging
import time

from fastserve.client.engine_link import EngineLink
from fastserve.client.interfaces import EngineDeadError
from fastserve.client.metrics import EngineMetrics
from fastserve.client.streams import OpenStreams, RequestStream
from fastserve.client.suspects import DEATHS_OF_A_SUSPECT, Suspects
from fastserve.core.messages import RequestFailedError, RequestUpdate
from fastserve.core.request import NO_HANDLE, Arrival, FinishReason
from fastserve.wire.engine_messages import (
    Abort,
    EngineInfo,
    Event,
    Finish,
    Rejected,
    RequestNumber,
    Updates,
)

logger = logging.getLogger(__name__)


class Dispatcher:
    """The open requests and the engine process that runs them."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self.streams = OpenStreams(metrics)
        self._metrics = metrics
        self._suspects = Suspects()
        self._link: EngineLink | None = None  # the latest that has loaded

    def submit(self, arrival: Arrival) -> RequestStream:
        """Take a request in, and run it as soon as it may."""
        stream = self.streams.open(arrival, self)
        link = self._link_for(stream.number)
        if link is not None:
            link.give(stream.as_command(time.monotonic()))
        return stream

    def tell(self, command: Abort | Finish) -> None:
        """Say something of a request, if an engine has it; others it will not hear of at all."""
        if self._link is not None:
            self._link.tell(command)

    def drop(self, stream: RequestStream) -> None:
        """End a request whose client has left."""
        self._end(stream.number, FinishReason.ABORT)

    # ── processes come and go ────────────────────────────────────────────────────────────────

    def begin(self, link: EngineLink, info: EngineInfo) -> None:
        """Hand every open request to a process that has just loaded, as far as each may run."""
        self._link = link
        self._metrics.loaded(info)
        self._suspects.begin_trials()
        self._hand_over()

    def lost(self, link: EngineLink, reason: str) -> bool:
        """Take note that a process died; return whether one request was to blame, and has ended."""
        culprit = self._suspects.charge(link.present_at_death())
        if culprit is None or culprit not in self.streams:
            return False
        logger.error("a request ended the engine %d times; it is given up", DEATHS_OF_A_SUSPECT)
        error = RequestFailedError(f"This request cannot be run: {reason}.")
        self._end(culprit, FinishReason.ERROR, error)
        return True

    def end_all(self, reason: str) -> None:
        """End every open request with EngineDeadError: no process will run them."""
        for stream in self.streams:
            self._end(stream.number, FinishReason.ERROR, EngineDeadError(reason))

    def _link_for(self, number: RequestNumber) -> EngineLink | None:
        """Return the process that may run a request; None while none serves, or in a trial."""
        is_serving = self._link is not None and self._link.is_serving
        return self._link if is_serving and self._suspects.on_trial in (None, number) else None

    def _hand_over(self) -> None:
        """Give the process all that it has not heard of and that may run."""
        for stream in self.streams:
            number = stream.number
            link = self._link_for(number)
            if link is None or link.has(number):
                continue
            if stream.finish_at is not None:  # its text is complete: only the word of it was lost
                self._update(number, RequestUpdate(NO_HANDLE, (), FinishReason.STOP))
                continue
            link.give(stream.as_command(time.monotonic()))

    # ── what the engine says ─────────────────────────────────────────────────────────────────

    def receive(self, event: Event) -> None:
        """Take in what a process says of requests, and its figures."""
        if isinstance(event, Updates):
            for number, update in event.updates:
                self._update(number, update)
            if event.stats is not None:
                self._metrics.snapshot(event.stats)
        elif isinstance(event, Rejected):
            self._end(event.number, FinishReason.ERROR, ValueError(event.message))

    def _update(self, number: RequestNumber, update: RequestUpdate) -> None:
        if number not in self.streams:  # it was aborted while this was on its way
            return
        self.streams.take(number, update)
        if update.finish_reason is not None:
            self._forget(number)
        elif update.samples:
            self._clear(number)

    def _end(
        self, number: RequestNumber, reason: FinishReason, error: Exception | None = None
    ) -> None:
        """End a request without an update; nothing is done if it has ended."""
        if number in self.streams:
            self.streams.end(number, reason, error)
            self._forget(number)

    def _forget(self, number: RequestNumber) -> None:
        if self._link is not None:
            self._link.forget(number)
        self._clear(number)

    def _clear(self, number: RequestNumber) -> None:
        """Let the next suspect run, or all requests, once this one is past its trial."""
        if self._suspects.clear(number):
            self._hand_over()
