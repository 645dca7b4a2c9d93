"""Decides which open request an engine process is given, and takes in what comes of it.

Rules: there is one dispatcher, however many replicas of the engine there are; a request is with
one of them at a time, and what another says of it is not heard. A new one goes where the router
(core/routing.py) expects the least work; what a dead replica had goes to living ones at once. A
process that has loaded is given every open request that none has. Requests go on from their ids so
far, as if nothing had happened, because sampling is seeded by (seed, position). After a death the
suspects (suspects.py) run before all others in a new process, one at a time, and a request that
ends every process it runs in ends alone.
Must not know: how a process is started and when it is replaced, text, HTTP.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

from fastserve.client.engine_link import EngineLink
from fastserve.client.interfaces import EngineDeadError
from fastserve.client.metrics import EngineMetrics
from fastserve.client.streams import OpenStreams, RequestStream
from fastserve.client.suspects import Suspects
from fastserve.core.messages import RequestFailedError, RequestUpdate
from fastserve.core.request import NO_HANDLE, Arrival, FinishReason
from fastserve.core.routing import ReplicaFacts, Router
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
    """The open requests and the replicas that run them: one for each of the `metrics`."""

    def __init__(self, *metrics: EngineMetrics, now: Callable[[], float] = time.monotonic) -> None:
        """`now` tells the seconds of a steady clock."""
        self.streams = OpenStreams(now)
        self.num_blamed = 0  # deaths that were one request's fault
        self._metrics = metrics
        self._now = now
        self._router = Router(len(metrics))
        self._suspects = Suspects()
        self._links: list[EngineLink | None] = [None] * len(metrics)  # those that have loaded
        self._lost_for_good: set[int] = set()

    def submit(self, arrival: Arrival) -> RequestStream:
        """Take a request in, and run it as soon as it may."""
        (stream,) = self.submit_choices([arrival])
        return stream

    def submit_choices(self, choices: Iterable[Arrival]) -> list[RequestStream]:
        """Take in the choices of a prompt, and run them as soon as they may.

        They differ in their seeds, and only the first may score the prompt: so a replica is sent
        the prompt once for all that it is to run of them.
        """
        streams = [self.streams.open(arrival, self) for arrival in choices]
        self._place(streams)
        return streams

    def tell(self, command: Abort | Finish) -> None:
        """Say something of a request, if an engine has it; others it will not hear of at all."""
        link = self._link_of(command.number)
        if link is not None:
            link.tell(command)

    def drop(self, stream: RequestStream) -> None:
        """End a request whose client has left."""
        self._end(stream.number, FinishReason.ABORT)

    # ── replicas come and go ─────────────────────────────────────────────────────────────────

    def begin(self, link: EngineLink, info: EngineInfo) -> None:
        """Let a process that has just loaded run what no other has, as far as each may run."""
        self._links[link.replica] = link
        self._router.open(link.replica, facts_of(info))
        self._metrics[link.replica].loaded(info)
        self._suspects.begin_trials(link.replica)
        self._hand_over()

    def lost(self, link: EngineLink, reason: str) -> bool:
        """Take note that a process died; return whether one request was to blame, and has ended.

        What else it had goes on in other replicas at once, as far as it may.
        """
        self._links[link.replica] = None
        self._router.close(link.replica)
        culprit = self._suspects.charge(link.present_at_death(), link.replica)
        is_blamed = culprit is not None and culprit in self.streams
        if culprit is not None and is_blamed:
            self.num_blamed += 1
            logger.error("a request ended every engine that ran it; it is given up")
            self._fail(culprit, reason)
        self._hand_over()
        return is_blamed

    def give_up(self, replica: int, reason: str) -> None:
        """Take note that a replica will not be there again; with the last one all requests end.

        Suspects run in a process that begins and in no other: where none will, they end too.
        """
        self._links[replica] = None
        self._router.close(replica)
        self._lost_for_good.add(replica)
        num_living = sum(link is not None for link in self._links)
        if len(self._lost_for_good) == len(self._links):
            self.end_all(reason)
            return
        is_none_to_come = num_living + len(self._lost_for_good) == len(self._links)
        if is_none_to_come and self._suspects.on_trial is None:
            for number in self._suspects.untried:
                self._fail(number, reason)
        self._hand_over()

    def end_all(self, reason: str, kind: type[Exception] = EngineDeadError) -> None:
        """End every open request with an error: no process is to run them any more."""
        for stream in self.streams:
            self.tell(Abort(stream.number))
            self._end(stream.number, FinishReason.ERROR, kind(reason))

    def _place(self, streams: Sequence[RequestStream]) -> None:
        """Give requests to the replicas where the least work is expected, if any may run them.

        It is one request, or new choices of one prompt.
        """
        by_replica: dict[int, list[RequestStream]] = {}
        for stream in streams:
            replica = self._route(stream)
            if replica is not None:
                by_replica.setdefault(replica, []).append(stream)
        for replica, (first, *siblings) in by_replica.items():
            if first.num_engines:
                self._metrics[replica].resumed()
            link = self._links[replica]
            assert link is not None
            link.give(first.as_command(self._now(), siblings))

    def _route(self, stream: RequestStream) -> int | None:
        """Return the replica that a request is to run in; None where none may, or need."""
        number = stream.number
        allowed = [
            replica
            for replica, link in enumerate(self._links)
            if link is not None and link.is_serving and self._suspects.may_run(number, replica)
        ]
        if not allowed:
            return None
        if stream.finish_at is not None:  # its text is complete: only the word of it was lost
            self._update(
                number,
                RequestUpdate(NO_HANDLE, (), FinishReason.STOP),
                self._metrics[allowed[0]],
            )
            return None
        return self._router.route(number, stream.arrival, allowed)

    def _hand_over(self) -> None:
        """Place all that no replica has and that may run."""
        for stream in self.streams:
            # One that has ended on the way may have let this be done for all before.
            if stream.number in self.streams and self._link_of(stream.number) is None:
                self._place([stream])

    def _link_of(self, number: RequestNumber) -> EngineLink | None:
        """Return the process that has a request."""
        for link in self._links:
            if link is not None and link.has(number):
                return link
        return None

    # ── what the engines say ─────────────────────────────────────────────────────────────────

    def receive(self, event: Event, replica: int = 0) -> None:
        """Take in what a replica says of requests, and its figures."""
        metrics = self._metrics[replica]
        if isinstance(event, Updates):
            link = self._links[replica]
            for number, update in event.updates:
                # It may have been aborted while this was on its way.
                if number in self.streams and link is not None and link.has(number):
                    self._update(number, update, metrics)
            if event.stats is not None:
                metrics.snapshot(event.stats)
        elif isinstance(event, Rejected):
            self._end(event.number, FinishReason.ERROR, ValueError(event.message))

    def _update(self, number: RequestNumber, update: RequestUpdate, metrics: EngineMetrics) -> None:
        stream = self.streams.take(number, update, metrics)
        if update.finish_reason is not None:
            self._forget(stream, update.finish_reason)
        elif update.samples:
            self._router.grew(number, len(stream.output_token_ids))
            self._clear(number)

    def _fail(self, number: RequestNumber, reason: str) -> None:
        error = RequestFailedError(f"This request cannot be run: {reason}.")
        self._end(number, FinishReason.ERROR, error)

    def _end(
        self, number: RequestNumber, reason: FinishReason, error: Exception | None = None
    ) -> None:
        """End a request without an update; nothing is done if it has ended."""
        if number in self.streams:
            link = self._link_of(number)
            metrics = self._metrics[0 if link is None else link.replica]
            self._forget(self.streams.end(number, reason, metrics, error), reason)

    def _forget(self, stream: RequestStream, reason: FinishReason) -> None:
        number = stream.number
        link = self._link_of(number)
        if link is not None:
            link.forget(number)
        if reason is FinishReason.ERROR:
            self._router.failed(number)
        else:
            ids = stream.output_token_ids
            self._router.ended(number, len(ids), ids)
        self._clear(number)

    def _clear(self, number: RequestNumber) -> None:
        """Let the next suspect run, or all requests, once this one is past its trial."""
        if self._suspects.clear(number):
            self._hand_over()


def facts_of(info: EngineInfo) -> ReplicaFacts:
    """Return what the router must know of an engine, whose stages share its time and its KV."""
    num_stages = info.pipeline_parallel_size
    return ReplicaFacts(
        cost_model=info.cost_model.shared_by(num_stages),
        max_num_seqs=info.max_num_seqs,
        max_request_tokens=info.max_request_tokens,
        block_size=info.block_size,
        num_kv_tokens=info.num_device_blocks * info.block_size // num_stages,
        num_cached_blocks=info.num_device_blocks if info.enable_prefix_caching else 0,
    )
