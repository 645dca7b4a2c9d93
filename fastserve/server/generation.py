"""Runs the choices of one HTTP request: their updates become text, merged into one stream of news.

Rules: however it ends (answered, client gone, engine dead) no choice is left running: all are
aborted on the way out, which harms none that has ended. Must not know: the shape of answers.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

from fastserve.client.interfaces import UpdateStream
from fastserve.core.messages import (
    NOT_FINITE,
    NotFiniteError,
    RequestFailedError,
    RequestMetrics,
    RequestUpdate,
    TokenLogprobs,
)
from fastserve.core.request import Arrival, FinishReason, SamplingParams
from fastserve.frontend.answer import Answer
from fastserve.server.context import ServerContext
from fastserve.server.deadlines import Deadline
from fastserve.server.errors import invalid
from fastserve.server.prompts import Prompt
from fastserve.text.tokenizer import TextDelta, TextStream
from fastserve.wire.engine_messages import EngineInfo

CHOICES_A_TURN = 128  # that are begun before others have theirs on the loop
NEWS_QUEUE = 16  # updates made into text in one turn; further ones merge in their streams


@dataclasses.dataclass(slots=True, eq=False)
class PromptScores:
    """The scores of a prompt, which its first choice brings and all of its choices show."""

    logprobs: Sequence[TokenLogprobs] = ()
    are_complete: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)


@dataclasses.dataclass(slots=True, eq=False)
class OutputCount:
    """The tokens of all choices of a request so far: counted on the way, for they may be many."""

    num_tokens: int = 0


@dataclasses.dataclass(slots=True, eq=False)
class Choice:
    """One choice of an answer: one request of the engine."""

    index: int
    prompt_index: int
    prompt: Prompt
    stream: UpdateStream
    answer: Answer
    scores: PromptScores
    count: OutputCount
    has_begun: bool = False  # something of it was sent

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprobs]:
        """The scores of the prompt that have come so far."""
        return self.scores.logprobs

    @property
    def shows_scores(self) -> bool:
        """Whether the next piece of its answer, the first, is to show the scores of its prompt."""
        return not self.has_begun and bool(self.scores.logprobs)

    @property
    def brings_scores(self) -> bool:
        """Whether the scores of its prompt, if there are any, come with this choice."""
        return self.scores.logprobs is self.answer.prompt_logprobs

    @property
    def metrics(self) -> RequestMetrics | None:
        """What happened to it, once it has ended."""
        return self.answer.metrics

    def take(self, update: RequestUpdate) -> TextDelta:
        """Turn one update into what the client may see of it; RequestFailedError if it failed."""
        num_before = self.answer.num_output_tokens
        delta = self.answer.take(update)
        self.count.num_tokens += self.answer.num_output_tokens - num_before
        if delta.samples or delta.finish_reason is not None:  # a token follows the whole prompt
            self.scores.are_complete.set()
        if self.answer.finish_reason is FinishReason.ERROR:
            kind = NotFiniteError if update.error == NOT_FINITE else RequestFailedError
            raise kind(update.error)
        if self.answer.finish_at is not None:
            self.stream.finish(self.answer.finish_at)
        return delta


class News(NamedTuple):
    """What one update of one choice adds."""

    choice: Choice
    delta: TextDelta


async def submit(
    context: ServerContext,
    info: EngineInfo,
    prompts: Sequence[Prompt],
    params: Sequence[SamplingParams],
    *,
    n: int,
    priority: int,
    client: str,
    cache_salt: str,
    tenant: str,
) -> list[Choice]:
    """Hand every prompt to the engine, once for CHOICES_A_TURN of its choices.

    Between the turns others have theirs, whose requests may take the last places: 429 then.
    """
    context.require_place(n * len(prompts))
    choices: list[Choice] = []
    count = OutputCount()
    turn_ends_at = CHOICES_A_TURN
    try:
        for prompt_index, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
            text = TextStream(context.tokenizer, prompt.token_ids, own, info.eos_token_ids)
            scores = PromptScores()
            if own.prompt_logprobs is None:
                scores.are_complete.set()
            arrival = Arrival(
                prompt.token_ids,
                own,
                priority=priority,
                client=client,
                cache_salt=cache_salt,
                tenant=tenant,
            )
            for first in range(0, n, CHOICES_A_TURN):
                if len(choices) >= turn_ends_at:
                    turn_ends_at = len(choices) + CHOICES_A_TURN
                    await asyncio.sleep(0)
                    context.require_place(n * len(prompts) - len(choices))
                begun = dataclasses.replace(arrival, params=own.of_choice(first))
                streams = context.engine.submit_choices(begun, min(CHOICES_A_TURN, n - first))
                choices += [
                    Choice(index, prompt_index, prompt, stream, Answer(text.twin()), scores, count)
                    for index, stream in enumerate(streams, len(choices))
                ]
                if first == 0:
                    scores.logprobs = choices[-len(streams)].answer.prompt_logprobs
    except BaseException as error:
        abort_all(choices)
        if isinstance(error, ValueError):
            raise invalid(str(error)) from error
        raise
    return choices


def abort_all(choices: Sequence[Choice]) -> None:
    """Let no choice run on."""
    for choice in choices:
        choice.stream.abort()


async def news_of(choices: Sequence[Choice], deadline: Deadline) -> AsyncGenerator[News]:
    """Yield the news of all choices as they come; raises the first failure, 504 when it is late."""
    if len(choices) == 1:
        choice, updates = choices[0], aiter(choices[0].stream)
        while (update := await deadline.wait(anext(updates, None))) is not None:
            yield News(choice, choice.take(update))
        return
    queue: asyncio.Queue[tuple[Choice, RequestUpdate | Exception | None]]
    queue = asyncio.Queue(NEWS_QUEUE)
    pumps: list[asyncio.Task[None]] = []
    try:
        for choice in choices:
            pumps.append(asyncio.create_task(pump(choice, queue)))
            if len(pumps) % CHOICES_A_TURN == 0:
                await asyncio.sleep(0)
        num_open = len(choices)
        while num_open:
            choice, item = await deadline.wait(queue.get())
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield News(choice, choice.take(item))
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def pump(
    choice: Choice, queue: asyncio.Queue[tuple[Choice, RequestUpdate | Exception | None]]
) -> None:
    """Put a choice's updates on the queue, then None, or the error that ended them.

    What shows the scores of its prompt waits for them.
    """
    end: Exception | None = None
    try:
        if not choice.brings_scores:
            await choice.scores.are_complete.wait()
        async for update in choice.stream:
            await queue.put((choice, update))
    except Exception as error:
        end = error
    await queue.put((choice, end))
