"""One answer in the making: the engine's updates become text, scores and an end.

Rules: the server and `LLM` put their answers together here, so that both stop, count and score
alike. A stop string is found here, and the engine must be told (`finish_at`).
Must not know: the engine, HTTP, how answers are shaped.
"""

from __future__ import annotations

from fastserve.core.messages import RequestMetrics, RequestUpdate, TokenLogprobs
from fastserve.core.request import FinishReason
from fastserve.text.text_stream import TextDelta, TextStream


class Answer:
    """What has come of one request; grows with the engine's news until its terminal update."""

    def __init__(self, text: TextStream) -> None:
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.metrics: RequestMetrics | None = None
        self.error: str | None = None  # with FinishReason.ERROR: why, in one line
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.finish_at: int | None = None  # ids up to a stop string that the engine has not seen
        self._text = text

    @property
    def num_output_tokens(self) -> int:
        """The ids that belong to the answer so far."""
        return self._text.num_output_tokens

    def take(self, update: RequestUpdate) -> TextDelta:
        """Take news in and return what they add."""
        delta = self._text.push(update.samples, update.finish_reason, update.stop_reason)
        self.prompt_logprobs.extend(update.prompt_logprobs)
        if update.finish_reason is None:
            self.finish_at = delta.num_output_tokens if delta.matched_stop is not None else None
        else:
            self.finish_at = None
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
            self.metrics, self.error = update.metrics, update.error
        return delta


def ranked_logprobs(
    token_id: int, entry: TokenLogprobs, num_top: int | None = None
) -> dict[int, tuple[float, int]]:
    """Return log probability and rank by id: of the given id, then of the best `num_top`."""
    ranked = {token_id: (entry.logprob, entry.rank)}
    best = zip(entry.top_ids[:num_top], entry.top_logprobs[:num_top], strict=True)
    for rank, (top_id, logprob) in enumerate(best, start=1):
        ranked.setdefault(top_id, (logprob, rank))
    return ranked
