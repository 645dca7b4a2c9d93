"""The requests of the API process: what each has said so far, and its one end.

Rules: a request keeps its prompt and its ids until it ends, which is all that is needed to run it
once more; updates that were not read yet are handed out as one. A request leaves OpenStreams when
it ends, so that it ends once, and there its tokens and its end are counted.
Must not know: processes, sockets, text, which engine runs a request.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from fastserve.client.metrics import EngineMetrics
from fastserve.core.messages import RequestMetrics, RequestUpdate
from fastserve.core.request import Arrival, FinishReason, SamplingParams
from fastserve.wire.engine_messages import Abort, Add, Finish, RequestNumber, Sibling


class StreamOwner(Protocol):
    """What a stream needs of the engine it belongs to."""

    def tell(self, command: Abort | Finish) -> None:
        """Say something of a request to the engine process."""

    def drop(self, stream: RequestStream) -> None:
        """Forget a stream whose client has left."""


class RequestStream:
    """The updates of one request, as an async iterator that ends after the terminal one."""

    def __init__(
        self, owner: StreamOwner, number: RequestNumber, arrival: Arrival, now: float
    ) -> None:
        self.number = number
        self.arrived_at = now - arrival.age_s  # in seconds of the caller's clock
        self.output_token_ids: list[int] = []
        self.error: Exception | None = None
        self.is_ended = False  # nothing more will come
        self.first_token_at: float | None = None
        self.last_token_at = 0.0
        self.finish_at: int | None = None  # a stop string matched after so many ids
        self.num_engines = 0  # that were given it, one after the other
        self._owner = owner
        self._arrival = arrival
        self._num_prompt_logprobs = 0  # received so far
        self._num_to_skip = 0  # of those, how many the next engine will send again
        self._pending: list[RequestUpdate] = []
        self._has_news = asyncio.Event()

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """The prompt."""
        return self._arrival.prompt_token_ids

    @property
    def params(self) -> SamplingParams:
        """How its tokens are drawn."""
        return self._arrival.params

    @property
    def arrival(self) -> Arrival:
        """The request as it stands, of the age that it came with."""
        if not self.output_token_ids:
            return self._arrival
        return dataclasses.replace(self._arrival, output_token_ids=self.output_token_ids)

    def as_command(self, now: float, siblings: Sequence[RequestStream] = ()) -> Add:
        """Return the message that makes an engine run this request, or go on with it.

        `siblings` are further choices of its prompt, none of which an engine was given yet.
        """
        for stream in (self, *siblings):
            stream.num_engines += 1
            stream._num_to_skip = stream._num_prompt_logprobs
        arrival = dataclasses.replace(self.arrival, age_s=now - self.arrived_at)
        return Add(self.number, arrival, tuple(sibling._as_sibling() for sibling in siblings))

    def _as_sibling(self) -> Sibling:
        assert self.params.seed is not None
        return Sibling(self.number, self.params.seed)

    def __aiter__(self) -> RequestStream:
        """Iterate over the updates that are still to come."""
        return self

    async def __anext__(self) -> RequestUpdate:
        """Return all that has come since the last call, as one update."""
        while not self._pending:
            if self.error is not None:
                raise self.error
            if self.is_ended:
                raise StopAsyncIteration
            self._has_news.clear()
            await self._has_news.wait()
        pending, self._pending = self._pending, []
        return pending[0] if len(pending) == 1 else merged(pending)

    def finish(self, num_output_tokens: int) -> None:
        """Say that a stop string matched after so many ids; the terminal update follows."""
        if not self.is_ended and self.finish_at is None:
            self.finish_at = num_output_tokens
            self._owner.tell(Finish(self.number, num_output_tokens))

    def abort(self) -> None:
        """Give the request up; nothing more comes."""
        if not self.is_ended:
            self._owner.tell(Abort(self.number))
            self._owner.drop(self)

    def push(self, update: RequestUpdate) -> None:
        """Take one update in."""
        if update.prompt_logprobs:
            update = self._unseen(update)
            if not (update.prompt_logprobs or update.samples or update.finish_reason):
                return
        self.output_token_ids.extend(sample.token_id for sample in update.samples)
        self._pending.append(update)
        self.is_ended = update.finish_reason is not None
        self._has_news.set()

    def _unseen(self, update: RequestUpdate) -> RequestUpdate:
        """Leave out the prompt logprobs that an engine before this one has sent already."""
        skipped = min(self._num_to_skip, len(update.prompt_logprobs))
        self._num_to_skip -= skipped
        unseen = update.prompt_logprobs[skipped:]
        self._num_prompt_logprobs += len(unseen)
        return update._replace(prompt_logprobs=unseen)

    def end(self, error: Exception | None = None) -> None:
        """Let nothing more come; an error is raised once all pending updates were read."""
        self.error = error
        self.is_ended = True
        self._has_news.set()


class OpenStreams:
    """The requests that have not ended, by number.

    What is counted of a request is counted with the engine that has it, which the caller names.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._streams: dict[RequestNumber, RequestStream] = {}
        self._all_ended = asyncio.Event()
        self._all_ended.set()
        self._next_number = RequestNumber(0)

    def __len__(self) -> int:
        """Return how many have not ended."""
        return len(self._streams)

    def __iter__(self) -> Iterator[RequestStream]:
        """Iterate over those that have not ended at this moment, oldest first."""
        return iter(list(self._streams.values()))

    def __contains__(self, number: RequestNumber) -> bool:
        """Return whether a request has not ended."""
        return number in self._streams

    async def idle(self) -> None:
        """Wait until every request has ended."""
        await self._all_ended.wait()

    def open(self, arrival: Arrival, owner: StreamOwner) -> RequestStream:
        """Take a request in, and give it a number."""
        stream = RequestStream(owner, self._next_number, arrival, self._now())
        self._streams[stream.number] = stream
        self._next_number = RequestNumber(self._next_number + 1)
        self._all_ended.clear()
        return stream

    def take(
        self, number: RequestNumber, update: RequestUpdate, metrics: EngineMetrics
    ) -> RequestStream:
        """Hand an update to its request, which has not ended; a terminal one ends it."""
        stream = self._streams[number]
        if update.samples:
            _count_tokens(stream, len(update.samples), metrics, self._now())
        stream.push(update)
        if update.finish_reason is not None:
            self._close(stream, update.finish_reason, metrics, update.metrics)
        return stream

    def end(
        self,
        number: RequestNumber,
        reason: FinishReason,
        metrics: EngineMetrics,
        error: Exception | None = None,
    ) -> RequestStream:
        """End a request without an update; its stream raises `error` after what is unread."""
        stream = self._streams[number]
        self._close(stream, reason, metrics)
        stream.end(error)
        return stream

    def _close(
        self,
        stream: RequestStream,
        reason: FinishReason,
        metrics: EngineMetrics,
        told: RequestMetrics | None = None,
    ) -> None:
        del self._streams[stream.number]
        if not self._streams:
            self._all_ended.set()
        metrics.finished(
            reason,
            len(stream.prompt_token_ids),
            len(stream.output_token_ids),
            self._now() - stream.arrived_at,
            told,
            stream.params,
        )


def _count_tokens(
    stream: RequestStream, num_tokens: int, metrics: EngineMetrics, now: float
) -> None:
    metrics.generated(num_tokens)
    if stream.first_token_at is None:
        stream.first_token_at = now
        metrics.first_token(len(stream.prompt_token_ids), now - stream.arrived_at)
    else:
        metrics.next_tokens(num_tokens, now - stream.last_token_at)
    stream.last_token_at = now


def merged(updates: Sequence[RequestUpdate]) -> RequestUpdate:
    """Return successive updates of one request as one."""
    samples = [sample for update in updates for sample in update.samples]
    logprobs = [entry for update in updates for entry in update.prompt_logprobs]
    return updates[-1]._replace(samples=samples, prompt_logprobs=logprobs)
