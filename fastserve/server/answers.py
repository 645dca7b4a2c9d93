"""What completions and chat answers have in common: ids, usage, extras on request.

Rules: a shape (completion.py, chat.py) holds one `Tally` and turns news into bodies by it.
Must not know: SSE, sockets, the engine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import msgspec

from fastserve.server.admission import num_logprobs, num_prompt_logprobs
from fastserve.server.generation import Choice, News
from fastserve.server.logprobs import TokenNames, prompt_logprobs
from fastserve.server.prompts import Prompt
from fastserve.server.protocol import GenerationRequest
from fastserve.server.responses import (
    Answer,
    CompletionChoice,
    Extras,
    PromptTokensDetails,
    Usage,
)
from fastserve.text.tokenizer import TextDelta


class Shape(Protocol):
    """Makes bodies of news: chunks of a stream, or one response."""

    tally: Tally
    kind: str

    def chunks(self, news: News) -> Sequence[Answer]:
        """Return the chunks for some news; none when there is nothing to send."""

    def whole(self, news: Sequence[News]) -> Answer:
        """Return the response; `news` is all there is of each choice, in order."""


class Tally:
    """The id, time and model of an answer, its token counts, and what the client asked to see."""

    def __init__(
        self,
        body: GenerationRequest,
        prompts: Sequence[Prompt],
        choices: Sequence[Choice],
        *,
        answer_id: str,
        model: str,
        names: TokenNames,
    ) -> None:
        options = body.stream_options
        self.body = body
        self.names = names
        self._count = choices[0].count
        self.includes_usage = bool(options and options.include_usage)
        self.has_running_usage = self.includes_usage and bool(
            options and options.continuous_usage_stats
        )
        self.counts_output = True  # no: only the prompt is wanted
        self._answer_id = answer_id
        self._model = model
        self._created = int(time.time())
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        firsts: dict[int, Choice] = {}
        for choice in choices:
            firsts.setdefault(choice.prompt_index, choice)
        self._firsts = tuple(firsts.values())  # of each prompt
        self._prompt_logprobs: dict[int, msgspec.Raw] = {}  # by prompt

    @property
    def has_scores(self) -> bool:
        """Whether log probabilities were asked for, which make an answer long."""
        return num_logprobs(self.body) is not None or num_prompt_logprobs(self.body) is not None

    def answer(self, kind: str, choices: Sequence[Extras]) -> Answer:
        """Return a body with these choices."""
        return Answer(
            id=self._answer_id,
            object=kind,
            created=self._created,
            model=self._model,
            choices=choices,
        )

    def chunk(self, kind: str, choices: Sequence[Extras]) -> Answer:
        """Return a chunk; with include_usage every chunk has the field, mostly as null."""
        chunk = self.answer(kind, choices)
        if self.has_running_usage:
            chunk.usage = self.usage()
        elif self.includes_usage:
            chunk.usage = None
        return chunk

    def usage(self) -> Usage:
        """Count the tokens so far; a prompt counts once however many choices it has.

        So what of it was cached is what its first choice found, once that has ended: the others
        find what the first one computed. What a restarted engine had of the answer is no prompt.
        """
        completion = self._count.num_tokens if self.counts_output else 0
        usage = Usage(self._num_prompt_tokens, completion, self._num_prompt_tokens + completion)
        cached = 0
        for choice in self._firsts:
            if choice.metrics is None:
                return usage
            cached += min(choice.metrics.cached_tokens, len(choice.prompt.token_ids))
        usage.prompt_tokens_details = PromptTokensDetails(cached)
        return usage

    def usage_chunk(self, kind: str) -> Answer | None:
        """Return the chunk before the end of a stream, when usage was asked for."""
        if not self.includes_usage:
            return None
        chunk = self.answer(kind, ())
        chunk.usage = self.usage()
        return chunk

    def has_something(self, delta: TextDelta) -> bool:
        """Whether a stream's client can see what this update adds."""
        shows_samples = bool(self.body.return_token_ids) or num_logprobs(self.body) is not None
        return bool(
            delta.text or delta.finish_reason is not None or (shows_samples and delta.samples)
        )

    def fill(self, target: Extras, news: News) -> None:
        """Give a choice the ids and the metrics that were asked for."""
        choice, delta = news
        if self.body.return_token_ids:
            target.token_ids = delta.token_ids
        if delta.finish_reason is not None and self.body.return_metrics:
            target.metrics = choice.metrics

    def fill_prompt(self, target: CompletionChoice | Answer, choice: Choice) -> None:
        """Give a body what was asked for about the prompt."""
        if self.body.return_token_ids:
            target.prompt_token_ids = choice.prompt.token_ids
        if self.body.prompt_logprobs is not None:
            made = self._prompt_logprobs.get(choice.prompt_index)
            if made is None:
                made = self._prompt_logprobs[choice.prompt_index] = prompt_logprobs(
                    self.names,
                    choice.prompt.token_ids,
                    choice.prompt_logprobs,
                    self.body.prompt_logprobs,
                )
            target.prompt_logprobs = made


def joined(deltas: Sequence[TextDelta]) -> TextDelta:
    """Return successive deltas of one output as one."""
    last = deltas[-1]
    return last._replace(
        text="".join(delta.text for delta in deltas),
        samples=tuple(sample for delta in deltas for sample in delta.samples),
        offsets=tuple(offset for delta in deltas for offset in delta.offsets),
    )
