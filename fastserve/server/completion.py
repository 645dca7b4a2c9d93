"""The shape of /v1/completions: text, legacy logprobs, echo.

Rules: with echo an output begins with its prompt, text and logprobs alike, and the offsets count
from there. In a whole answer they point into its text: tokens that a stop string cut stand at its
end; a stream has sent theirs before the cut is known. Must not know: SSE, the engine.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastserve.server.admission import is_echo_alone
from fastserve.server.answers import Tally
from fastserve.server.echo import Echo, echo_of
from fastserve.server.generation import Choice, News
from fastserve.server.logprobs import completion_logprobs, following
from fastserve.server.protocol import CompletionRequest
from fastserve.server.responses import Answer, CompletionChoice, CompletionLogprobs
from fastserve.text.tokenizer import Tokenizer

KIND = "text_completion"


class CompletionShape:
    """Makes bodies for one completion request."""

    def __init__(self, body: CompletionRequest, tally: Tally, tokenizer: Tokenizer | None) -> None:
        self.tally = tally
        self.kind = KIND
        self._body = body
        self._tokenizer = tokenizer
        self._is_echo_alone = is_echo_alone(body)
        self._echoes: dict[int, Echo] = {}  # by prompt
        self._echoed_logprobs: dict[int, CompletionLogprobs] = {}  # by prompt
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
        choices = [self._choice(within_text(one), is_first=True) for one in news]
        answer = self.tally.answer(KIND, choices)
        answer.usage = self.tally.usage()
        return answer

    def _choice(self, news: News, *, is_first: bool) -> CompletionChoice:
        choice, delta = news
        if self._is_echo_alone:
            delta = delta._replace(text="", samples=(), offsets=())
        echo = self._echo(choice) if self._body.echo else Echo("", [])
        made = CompletionChoice(
            index=choice.index,
            text=echo.text + delta.text if is_first else delta.text,
            finish_reason=None if delta.finish_reason is None else delta.finish_reason.value,
            stop_reason=None if delta.finish_reason is None else delta.stop_reason,
        )
        if self._is_echo_alone and delta.finish_reason is not None:
            made.finish_reason, made.stop_reason = "length", None
        if self._body.logprobs is not None:
            made.logprobs = completion_logprobs(
                self.tally.names,
                [(sample.token_id, sample.logprobs) for sample in delta.samples],
                [len(echo.text) + offset for offset in delta.offsets],
                self._body.logprobs,
            )
            if self._body.echo and is_first:
                made.logprobs = following(self._logprobs_of_echo(choice, echo), made.logprobs)
        self.tally.fill(made, news._replace(delta=delta))
        if is_first:
            self.tally.fill_prompt(made, choice)
        return made

    def _logprobs_of_echo(self, choice: Choice, echo: Echo) -> CompletionLogprobs:
        """Return the scores of a choice's prompt; the choices of one prompt share them."""
        made = self._echoed_logprobs.get(choice.prompt_index)
        if made is None:
            assert self._body.logprobs is not None
            tokens = zip(choice.prompt.token_ids, (None, *choice.prompt_logprobs), strict=True)
            made = self._echoed_logprobs[choice.prompt_index] = completion_logprobs(
                self.tally.names, list(tokens), echo.offsets, self._body.logprobs
            )
        return made

    def _echo(self, choice: Choice) -> Echo:
        """Return the echo of a choice's prompt; the choices of one prompt share it."""
        echo = self._echoes.get(choice.prompt_index)
        if echo is None:
            assert self._tokenizer is not None, "echo is refused where there is no tokenizer"
            echo = self._echoes[choice.prompt_index] = echo_of(
                choice.prompt,
                self._tokenizer,
                adds_special_tokens=self._body.add_special_tokens is not False,
                is_alone=self._is_echo_alone,
            )
        return echo


def within_text(news: News) -> News:
    """Return news of a whole output with no offset behind its text: a stop string may cut it."""
    choice, delta = news
    end = len(delta.text)
    return News(choice, delta._replace(offsets=tuple(min(at, end) for at in delta.offsets)))
