"""What an LLM call returns, with vLLM's names, and how an answer is put together.

Rules: results are frozen; `Choice` grows with the engine's news until its terminal update.
Must not know: the engine, prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fastserve.core.output import RequestMetrics, RequestUpdate, TokenLogprobs
from fastserve.core.request import FinishReason
from fastserve.tokenizer import TextStream


@dataclasses.dataclass(frozen=True, slots=True)
class Logprob:
    """Log probability of one id at one position, its rank (1 = best) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer."""

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


class Choice:
    """One answer in the making."""

    def __init__(self, text: TextStream, token_text: Callable[[int], str | None]) -> None:
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.metrics: RequestMetrics | None = None
        self.token_ids: list[int] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self._stream = text
        self._token_text = token_text
        self._pieces: list[str] = []
        self._num_taken = 0
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative_logprob = 0.0

    def push(self, update: RequestUpdate) -> int | None:
        """Take an update in; return the number of ids at which a stop string has just matched."""
        delta = self._stream.push(update.samples, update.finish_reason, update.stop_reason)
        self._pieces.append(delta.text)
        self.prompt_logprobs.extend(update.prompt_logprobs)
        for sample in delta.samples:
            self.token_ids.append(sample.token_id)
            if sample.logprobs is not None:
                self._cumulative_logprob += sample.logprobs.logprob
                self._logprobs.append(
                    logprob_table(sample.token_id, sample.logprobs, self._token_text)
                )
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason
            self.metrics = update.metrics
        return delta.num_output_tokens if delta.matched_stop is not None else None

    def take_text(self) -> str:
        """Return the text that came since the last call."""
        text = "".join(self._pieces[self._num_taken :])
        self._num_taken = len(self._pieces)
        return text

    def output(self, index: int, has_logprobs: bool) -> CompletionOutput:
        """Return the answer as it is now."""
        return CompletionOutput(
            index=index,
            text="".join(self._pieces),
            token_ids=self.token_ids,
            cumulative_logprob=self._cumulative_logprob if has_logprobs else None,
            logprobs=self._logprobs if has_logprobs else None,
            finish_reason=self.finish_reason.value if self.finish_reason is not None else None,
            stop_reason=self.stop_reason,
        )


def logprob_table(
    token_id: int, entry: TokenLogprobs, token_text: Callable[[int], str | None]
) -> dict[int, Logprob]:
    """Return the chosen id and the best ones by id, as vLLM does."""
    table = {token_id: Logprob(entry.logprob, entry.rank, token_text(token_id))}
    for rank, (other, logprob) in enumerate(
        zip(entry.top_ids, entry.top_logprobs, strict=True), start=1
    ):
        table.setdefault(other, Logprob(logprob, rank, token_text(other)))
    return table
