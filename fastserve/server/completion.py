"""The shape of /v1/completions: text, legacy logprobs, echo.

Rules: with echo an output begins with its prompt, text and logprobs alike, and the offsets count
from there. Must not know: SSE, the engine.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastserve.core.output import TokenLogprobs
from fastserve.server.admission import is_echo_alone
from fastserve.server.answers import Tally
from fastserve.server.generation import Choice, News
from fastserve.server.logprobs import completion_logprobs
from fastserve.server.protocol import CompletionRequest
from fastserve.server.responses import Answer, CompletionChoice
from fastserve.text_stream import Detokenizer
from fastserve.tokenizer import Tokenizer

KIND = "text_completion"


class CompletionShape:
    """Makes bodies for one completion request."""

    def __init__(self, body: CompletionRequest, tally: Tally, tokenizer: Tokenizer | None) -> None:
        self.tally = tally
        self.kind = KIND
        self._body = body
        self._tokenizer = tokenizer
        self._is_echo_alone = is_echo_alone(body)
        tally.counts_output = not self._is_echo_alone

    def chunks(self, news: News) -> Sequence[Answer]:
        """Return the chunk for some news; the first of an echo waits for the prompt's scores."""
        choice, delta = news
        if self._body.echo and not choice.has_begun:
            if not (delta.samples or delta.finish_reason is not None):
                return ()
        elif not self.tally.has_something(delta):
            return ()
        made = self._choice(news, is_first=not choice.has_begun)
        choice.has_begun = True
        return (self.tally.chunk(KIND, (made,)),)

    def whole(self, news: Sequence[News]) -> Answer:
        """Return the response."""
        answer = self.tally.answer(KIND, [self._choice(one, is_first=True) for one in news])
        answer.usage = self.tally.usage()
        return answer

    def _choice(self, news: News, *, is_first: bool) -> CompletionChoice:
        choice, delta = news
        if self._is_echo_alone:
            delta = delta._replace(text="", samples=(), offsets=())
        is_echo = bool(self._body.echo)
        prompt_text = self._prompt_text(choice) if is_echo else ""
        made = CompletionChoice(
            index=choice.index,
            text=prompt_text + delta.text if is_first else delta.text,
            finish_reason=None if delta.finish_reason is None else delta.finish_reason.value,
            stop_reason=None if delta.finish_reason is None else delta.stop_reason,
        )
        if self._is_echo_alone and delta.finish_reason is not None:
            made.finish_reason, made.stop_reason = "length", None
        if self._body.logprobs is not None:
            tokens: list[tuple[int, TokenLogprobs | None]] = []
            offsets: list[int] = []
            if is_echo and is_first:
                tokens.extend(
                    zip(choice.prompt.token_ids, (None, *choice.prompt_logprobs), strict=True)
                )
                offsets.extend(self._prompt_offsets(choice))
            tokens.extend((sample.token_id, sample.logprobs) for sample in delta.samples)
            offsets.extend(len(prompt_text) + offset for offset in delta.offsets)
            made.logprobs = completion_logprobs(
                self.tally.names, tokens, offsets, self._body.logprobs
            )
        self.tally.fill(made, news._replace(delta=delta))
        if is_first:
            self.tally.fill_prompt(made, choice)
        return made

    def _prompt_text(self, choice: Choice) -> str:
        """Return the prompt as it was given, or its ids as text."""
        if choice.prompt.text is not None or self._tokenizer is None:
            return choice.prompt.text or ""
        return self._tokenizer.decode(
            choice.prompt.token_ids, skip_special_tokens=choice.params.skip_special_tokens
        )

    def _prompt_offsets(self, choice: Choice) -> list[int]:
        """Return where in the prompt's text each of its tokens begins."""
        if self._tokenizer is None:
            return [0] * len(choice.prompt.token_ids)
        detokenizer = Detokenizer(
            self._tokenizer, skip_special_tokens=choice.params.skip_special_tokens
        )
        offsets, position = [], 0
        for token_id in choice.prompt.token_ids:
            offsets.append(position)
            position += len(detokenizer.push(token_id))
        return offsets
