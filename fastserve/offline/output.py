"""What an LLM call returns, with vLLM's names.

Rules: results are frozen; `Choice` grows with the engine's news until its terminal update.
Must not know: the engine, prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fastserve.core.messages import RequestMetrics, RequestUpdate, TokenLogprobs
from fastserve.frontend.answer import Answer, ranked_logprobs
from fastserve.text.tokenizer import TextStream


@dataclasses.dataclass(frozen=True, slots=True)
class Logprob:
    """Log probability of one id at one position, its rank (1 = best) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer. `finish_reason` is stop, length, or error: the step that ran it failed."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclasses.dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt and its answers. `metrics` are those of the first answer."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None
    num_cached_tokens: int | None = None  # of the prompt, whose KV was there already


class Choice:
    """One answer of a call, in the making."""

    def __init__(self, text: TextStream, token_text: Callable[[int], str | None]) -> None:
        self.answer = Answer(text)
        self.token_ids: list[int] = []
        self._token_text = token_text
        self._pieces: list[str] = []
        self._num_taken = 0
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative_logprob = 0.0

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.answer.finish_reason is not None

    def push(self, update: RequestUpdate) -> None:
        """Take an update in."""
        delta = self.answer.take(update)
        self._pieces.append(delta.text)
        for sample in delta.samples:
            self.token_ids.append(sample.token_id)
            if sample.logprobs is not None:
                self._cumulative_logprob += sample.logprobs.logprob
                self._logprobs.append(
                    logprob_table(sample.token_id, sample.logprobs, self._token_text)
                )

    def take_text(self) -> str:
        """Return the text that came since the last call."""
        text = "".join(self._pieces[self._num_taken :])
        self._num_taken = len(self._pieces)
        return text

    def output(self, index: int, has_logprobs: bool) -> CompletionOutput:
        """Return the answer as it is now."""
        reason = self.answer.finish_reason
        return CompletionOutput(
            index=index,
            text="".join(self._pieces),
            token_ids=self.token_ids,
            cumulative_logprob=self._cumulative_logprob if has_logprobs else None,
            logprobs=self._logprobs if has_logprobs else None,
            finish_reason=None if reason is None else reason.value,
            stop_reason=self.answer.stop_reason,
        )


def logprob_table(
    token_id: int, entry: TokenLogprobs, token_text: Callable[[int], str | None]
) -> dict[int, Logprob]:
    """Return the chosen id and the best ones by id, as vLLM does."""
    return {
        ranked_id: Logprob(logprob, rank, token_text(ranked_id))
        for ranked_id, (logprob, rank) in ranked_logprobs(token_id, entry).items()
    }
