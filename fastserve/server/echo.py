"""An echoed prompt: its text, and where in that text each of its tokens begins.

Rules: a text is echoed as it was given, and tokens that the tokenizer put around it take no room in
it; ids are echoed as what they say, special tokens and all. Offsets never fall, and what no token
stands for (a normalizer dropped it) belongs to the token before it. Must not know: bodies, streams.
"""

from __future__ import annotations

from typing import NamedTuple

from fastserve.server.prompts import Prompt
from fastserve.text.text_stream import Detokenizer
from fastserve.text.tokenizer import Tokenizer


class Echo(NamedTuple):
    """A prompt as it stands before its outputs."""

    text: str
    offsets: list[int]  # of each prompt token, characters


def echo_of(
    prompt: Prompt, tokenizer: Tokenizer, *, adds_special_tokens: bool, is_alone: bool
) -> Echo:
    """Return a prompt's echo; `is_alone` says that no output follows.

    `adds_special_tokens` is what the prompt was encoded with; it matters to texts alone.
    """
    if prompt.text is not None:
        return Echo(prompt.text, text_offsets(prompt, prompt.text, tokenizer, adds_special_tokens))
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    pieces: list[str] = []
    offsets: list[int] = []
    num_chars = 0
    for token_id in prompt.token_ids:
        offsets.append(num_chars)
        pieces.append(detokenizer.push(token_id))
        num_chars += len(pieces[-1])
    if is_alone:  # otherwise the output says what becomes of a character begun
        pieces.append(detokenizer.flush())
    return Echo("".join(pieces), offsets)


def text_offsets(
    prompt: Prompt, text: str, tokenizer: Tokenizer, adds_special_tokens: bool
) -> list[int]:
    """Return where in `text` each token of its encoding begins."""
    spans = tokenizer.encode_spans(text, adds_special_tokens)
    offsets = []
    following = len(text)
    for token_id, span in zip(reversed(prompt.token_ids), reversed(spans), strict=True):
        if span is not None:
            following = min(following, beginning(text, span, tokenizer.token_text(token_id)))
        offsets.append(following)
    offsets.reverse()
    offsets[0] = 0
    return offsets


def beginning(text: str, span: tuple[int, int], token_text: str) -> int:
    """Return where a token begins; some tokenizers leave a token's own spaces out of its span."""
    first, end = span
    if end - first < len(token_text):
        num_own = len(token_text) - len(token_text.lstrip())
        before = text[max(0, first - num_own) : first]
        first -= len(before) - len(before.rstrip())
    return first
