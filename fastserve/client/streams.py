"""RequestStream: the news of one request, and all that is needed to run it once more.

Rules: it keeps the prompt and the ids so far until the terminal update; updates that nobody has
read yet are handed out as one. Must not know: processes, sockets, text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import msgspec

from fastserve.core.messages import RequestUpdate
from fastserve.core.request import SamplingParams
from fastserve.wire.engine_messages import Abort, Add, Finish


class StreamOwner(Protocol):
    """What a stream needs of the engine it belongs to."""

    def tell(self, command: Abort | Finish) -> None:
        """Say something of a request to the engine process."""

    def drop(self, stream: RequestStream) -> None:
        """Forget a stream whose client has left."""


class RequestStream:
    """The news of one request, as an async iterator that ends after the terminal update."""

    def __init__(self, owner: StreamOwner, add: Add) -> None:
        self.request_id = add.request
        self.output_token_ids: list[int] = []
        self.error: Exception | None = None
        self.is_ended = False  # nothing more will come
        self.first_token_at: float | None = None
        self.last_token_at = 0.0
        self.num_prompt_logprobs = 0  # received so far
        self.num_to_skip = 0  # of those a restarted engine sends again
        self.finish_at: int | None = None  # a stop string matched after so many ids
        self._owner = owner
        self._add = add
        self._pending: list[RequestUpdate] = []
        self._arrival = asyncio.Event()

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """The prompt."""
        return self._add.prompt_token_ids

    @property
    def params(self) -> SamplingParams:
        """How its tokens are drawn."""
        return self._add.params

    @property
    def arrived_at(self) -> float:
        """When the request was accepted, in seconds of the monotonic clock."""
        return self._add.arrived_at

    def as_command(self) -> Add:
        """Return the message that makes an engine go on with this request."""
        return msgspec.structs.replace(self._add, output_token_ids=self.output_token_ids)

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
            self._arrival.clear()
            await self._arrival.wait()
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
        self._arrival.set()

    def end(self, error: Exception | None = None) -> None:
        """Let nothing more come; an error is raised once all pending updates were read."""
        self.error = error
        self.is_ended = True
        self._arrival.set()


def merged(updates: Sequence[RequestUpdate]) -> RequestUpdate:
    """Return successive updates of one request as one."""
    samples = [sample for update in updates for sample in update.samples]
    logprobs = [entry for update in updates for entry in update.prompt_logprobs]
    return updates[-1]._replace(samples=samples, prompt_logprobs=logprobs)
