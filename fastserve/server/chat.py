"""The shape of /v1/chat/completions: messages, deltas, content logprobs.

Rules: a stream's first event of a choice names the role and comes with its first token, not
before: clients take the first event for the first token. Must not know: SSE, the engine.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastserve.server.answers import Tally
from fastserve.server.generation import News
from fastserve.server.logprobs import chat_logprobs
from fastserve.server.protocol import ChatCompletionRequest
from fastserve.server.responses import (
    Answer,
    ChatChoice,
    ChatChunkChoice,
    ChatLogprobs,
    Delta,
    Said,
)

KIND = "chat.completion"
CHUNK_KIND = "chat.completion.chunk"


class ChatShape:
    """Makes bodies for one chat request."""

    def __init__(self, body: ChatCompletionRequest, tally: Tally) -> None:
        self.tally = tally
        self.kind = CHUNK_KIND
        self._body = body

    def chunks(self, news: News) -> Sequence[Answer]:
        """Return the chunks for some news: the role first, then content."""
        choice, delta = news
        if not self.tally.has_something(delta):
            return ()
        made = ChatChunkChoice(
            index=choice.index,
            delta=Delta(content=delta.text) if delta.text or delta.samples else Delta(),
            logprobs=self._logprobs(news),
        )
        if delta.finish_reason is not None:
            made.finish_reason = delta.finish_reason.value
            made.stop_reason = delta.stop_reason
        self.tally.fill(made, news)
        chunk = self.tally.chunk(CHUNK_KIND, (made,))
        if choice.has_begun:
            return (chunk,)
        choice.has_begun = True
        role = ChatChunkChoice(index=choice.index, delta=Delta(role="assistant", content=""))
        first = self.tally.chunk(CHUNK_KIND, (role,))
        self.tally.fill_prompt(first, choice)
        return (first, chunk)

    def whole(self, news: Sequence[News]) -> Answer:
        """Return the response."""
        choices = []
        for one in news:
            delta = one.delta
            made = ChatChoice(
                index=one.choice.index,
                message=Said(content=delta.text),
                logprobs=self._logprobs(one),
                finish_reason=None if delta.finish_reason is None else delta.finish_reason.value,
                stop_reason=delta.stop_reason,
            )
            self.tally.fill(made, one)
            choices.append(made)
        answer = self.tally.answer(KIND, choices)
        answer.usage = self.tally.usage()
        self.tally.fill_prompt(answer, news[0].choice)
        return answer

    def _logprobs(self, news: News) -> ChatLogprobs | None:
        if not self._body.logprobs or not news.delta.samples:
            return None
        return chat_logprobs(self.tally.names, news.delta.samples, self._body.top_logprobs or 0)
