"""Log probabilities in OpenAI's two shapes and vLLM's one.

Rules: a token whose bytes are no text alone is spelled "bytes:\\xe2\\x82", so that names in a
mapping stay apart. JSON has no infinity: what cannot be is -9999. Must not know: requests, streams.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from fastserve.core.messages import Sample, TokenLogprobs
from fastserve.frontend.answer import ranked_logprobs
from fastserve.server.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    RankedLogprob,
    TokenLogprob,
    TopLogprob,
)
from fastserve.text.text_stream import REPLACEMENT
from fastserve.text.tokenizer import Tokenizer

LEAST = -9999.0


class TokenNames:
    """How tokens are spelled in logprobs."""

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool) -> None:
        self._tokenizer = None if as_ids else tokenizer
        self._decoder = tokenizer

    def name(self, token_id: int) -> str:
        """Return a token's text, or its bytes, or its id, whichever says what it is."""
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        text = self._tokenizer.token_text(token_id)
        if REPLACEMENT in text:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in self._tokenizer.token_bytes(token_id))
        return text

    def text(self, token_id: int) -> str:
        """Return a token's text, or its id."""
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.token_text(token_id)

    def bytes(self, token_id: int) -> list[int] | None:
        """Return a token's bytes."""
        if self._tokenizer is None:
            return None
        return list(self._tokenizer.token_bytes(token_id))

    def decoded(self, token_id: int) -> str | None:
        """Return a token's text where there is a tokenizer, however tokens are named."""
        return None if self._decoder is None else self._decoder.token_text(token_id)


def scored(
    token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]
) -> list[tuple[int, TokenLogprobs | None]]:
    """Pair ids with their scores."""
    return list(zip(token_ids, entries, strict=True))


def completion_logprobs(
    names: TokenNames,
    tokens: Sequence[tuple[int, TokenLogprobs | None]],
    offsets: Sequence[int],
    num_top: int,
) -> CompletionLogprobs:
    """Return the four lists of a completion; the chosen token is always among the top ones.

    Of tokens with one name the best counts: the chosen one is greedy if none of `top` is above it.
    """
    logprobs = CompletionLogprobs([], [], [], list(offsets))
    for token_id, entry in tokens:
        name = names.name(token_id)
        logprobs.tokens.append(name)
        if entry is None:
            logprobs.token_logprobs.append(None)
            logprobs.top_logprobs.append(None)
            continue
        chosen = max(LEAST, entry.logprob)
        logprobs.token_logprobs.append(chosen)
        top: dict[str, float] = {}
        for top_id, value in top_of(entry, num_top):
            top.setdefault(names.name(top_id), value)
        top[name] = max(chosen, top.get(name, chosen))
        logprobs.top_logprobs.append(top)
    return logprobs


def following(before: CompletionLogprobs, after: CompletionLogprobs) -> CompletionLogprobs:
    """Return the lists of two texts of which one follows the other."""
    return CompletionLogprobs(
        [*before.tokens, *after.tokens],
        [*before.token_logprobs, *after.token_logprobs],
        [*before.top_logprobs, *after.top_logprobs],
        [*before.text_offset, *after.text_offset],
    )


def top_of(entry: TokenLogprobs, num_top: int) -> list[tuple[int, float]]:
    """Return the best ids and their scores, best first."""
    ids, values = entry.top_ids[:num_top], entry.top_logprobs[:num_top]
    return [(top_id, max(LEAST, value)) for top_id, value in zip(ids, values, strict=True)]


def chat_logprobs(names: TokenNames, samples: Sequence[Sample], num_top: int) -> ChatLogprobs:
    """Return the content list of a chat answer."""
    content = []
    for sample in samples:
        entry = sample.logprobs
        if entry is None:
            continue
        content.append(
            TokenLogprob(
                names.text(sample.token_id),
                max(LEAST, entry.logprob),
                names.bytes(sample.token_id),
                [
                    TopLogprob(names.text(top_id), value, names.bytes(top_id))
                    for top_id, value in top_of(entry, num_top)
                ],
            )
        )
    return ChatLogprobs(content)


def prompt_logprobs(
    names: TokenNames, token_ids: Sequence[int], entries: Sequence[TokenLogprobs], num_top: int
) -> msgspec.Raw:
    """Return vLLM's list: per prompt token, the scores of the best ids and of the token itself.

    It is JSON already, for it may be long, and each choice of the prompt shows it.
    """
    encoded = [b"null"]
    for token_id, entry in scored(token_ids[1:], entries):
        assert entry is not None
        ranked = {
            str(ranked_id): RankedLogprob(max(LEAST, value), rank, names.decoded(ranked_id))
            for ranked_id, (value, rank) in ranked_logprobs(token_id, entry, num_top).items()
        }
        encoded.append(msgspec.json.encode(ranked))
    return msgspec.Raw(b"[" + b",".join(encoded) + b"]")
