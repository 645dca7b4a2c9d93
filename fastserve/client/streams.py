"""RequestStream: the news of one request, and all that is needed to run it once more.

Rules: it keeps the prompt and the ids so far until the terminal update; updates that nobody has
read yet are handed out as one. Must not know: processes, sockets, text.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Protocol

from fastserve.core.messages import RequestUpdate
from fastserve.core.request import Arrival, SamplingParams
from fastserve.wire.engine_messages import Abort, Add, Finish


class StreamOwner(Protocol):
    """What a stream needs of the engine it belongs to."""

    def tell(self, command: Abort | Finish) -> None:
        """Say something of a request to the engine process."""

    def drop(self, stream: RequestStream) -> None:
        """Forget a stream whose client has left."""


class RequestStream:
    """The news of one request, as an async iterator that ends after the terminal update."""

    def __init__(self, owner: StreamOwner, request_id: int, arrival: Arrival, now: float) -> None:
        self.request_id = request_id
        self.arrived_at = now - arrival.age_s  # in seconds of the caller's clock
        self.output_token_ids: list[int] = []
        self.error: Exception | None = None
        self.is_ended = False  # nothing more will come
        self.first_token_at: float | None = None
        self.last_token_at = 0.0
        self.num_prompt_logprobs = 0  # received so far
        self.num_to_skip = 0  # of those a restarted engine sends again
        self.finish_at: int | None = None  # a stop string matched after so many ids
        self._owner = owner
        self._arrival = arrival
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

    def as_command(self, now: float) -> Add:
        """Return the message that makes an engine run this request, or go on with it."""
        arrival = dataclasses.replace(
            self._arrival, age_s=now - self.arrived_at, output_token_ids=self.output_token_ids
        )
        return Add(self.request_id, arrival)

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
            self._owner.tell(Finish(self.request_id, num_output_tokens))

    def abort(self) -> None:
        """Give the request up; nothing more comes."""
        if not self.is_ended:
            self._owner.tell(Abort(self.request_id))
            self._owner.drop(self)

    def push(self, update: RequestUpdate) -> None:
        """Take one update in."""
        self.output_token_ids.extend(sample.token_id for sample in update.samples)
        self._pending.append(update)
        self.is_ended = update.finish_reason is not None
        self._has_news.set()

    def end(self, error: Exception | None = None) -> None:
        """Let nothing more come; an error is raised once all pending updates were read."""
        self.error = error
        self.is_ended = True
        self._has_news.set()


def merged(updates: Sequence[RequestUpdate]) -> RequestUpdate:
    """Return successive updates of one request as one."""
    samples = [sample for update in updates for sample in update.samples]
    logprobs = [entry for update in updates for entry in update.prompt_logprobs]
    return updates[-1]._replace(samples=samples, prompt_logprobs=logprobs)
