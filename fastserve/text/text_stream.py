"""The text of a growing output: ids become characters, stop strings are found.

Rules: `TextStream` never gives half a character nor text that may still become a stop string, and
what it gives in pieces is what decoding everything at once would give. Tokens are taken one at a
time, so that the result does not depend on how updates were merged.
Must not know: where a tokenizer comes from, HTTP, the engine, torch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from fastserve.core.messages import Sample
from fastserve.core.request import FinishReason, SamplingParams

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are not (yet) a character
CONTEXT_TOKENS = 5  # of the prompt: decides about a space before the first output word
MAX_CONTEXT = CONTEXT_TOKENS + 3  # a character has up to four bytes
MAX_WINDOW_TOKENS = 64  # without a whole character; beyond, bytes are garbage and shown as such


class Decoder(Protocol):
    """What a text stream asks of a tokenizer."""

    special_ids: frozenset[int]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`."""


class Detokenizer:
    """Ids in, text out, one at a time, only whole characters.

    Decodes a short window of ids rather than one: spaces and characters may span tokens.
    """

    def __init__(
        self, tokenizer: Decoder, context: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._window = self._clean_end(context[-MAX_CONTEXT:])
        self._num_emitted = len(self._decode(self._window).rstrip(REPLACEMENT))
        self._num_settled = len(self._window)  # ids of the window that end on a whole character

    def twin(self) -> Detokenizer:
        """Return one of another output, at the same point."""
        made = copy.copy(self)
        made._window = list(self._window)
        return made

    def push(self, token_id: int) -> str:
        """Add one id and return the text that has become certain."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        is_whole = not text.endswith(REPLACEMENT)
        can_wait = len(self._window) - self._num_settled < MAX_WINDOW_TOKENS
        if not is_whole and can_wait:
            piece = text.rstrip(REPLACEMENT)[self._num_emitted :]
            self._num_emitted += len(piece)
            return piece
        piece = text[self._num_emitted :]
        if not piece and can_wait:  # ids without text decide nothing about what follows
            return ""
        self._window = self._window[self._num_settled :]
        self._num_settled = len(self._window)
        self._num_emitted = len(self._decode(self._window))
        return piece

    def flush(self) -> str:
        """Return what is left, unfinished characters as replacement characters."""
        piece = self._decode(self._window)[self._num_emitted :]
        self._num_emitted += len(piece)
        return piece

    def _clean_end(self, context: Sequence[int]) -> list[int]:
        """Return the last ids, as many as it takes not to begin within a character.

        A prompt may end within one: then the output completes it.
        """
        ids = [token_id for token_id in context if token_id not in self._skipped]
        ends = [ids[-size:] for size in range(CONTEXT_TOKENS, MAX_CONTEXT + 1)]
        texts = [self._decode(end) for end in ends]
        for end, text in zip(ends, texts, strict=True):
            if REPLACEMENT not in text:
                return end
        for end, text in zip(ends, texts, strict=True):
            if REPLACEMENT not in text.rstrip(REPLACEMENT):
                return end
        return []

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class StopScanner:
    """Passes text on until a stop string is complete; holds back what may become one.

    The match that begins first wins; one completed by text that may not stop does not count.
    """

    def __init__(self, stop_strings: Sequence[str], include: bool) -> None:
        self._stops = tuple(stop_strings)
        self._include = include
        self._overlap = max(map(len, self._stops), default=1) - 1
        self._tail = ""  # the last characters seen, as many as a match may reach back to
        self._num_held = 0  # characters at the end of `_tail` not yet passed on

    def push(self, text: str, can_stop: bool) -> tuple[str, str | None]:
        """Return the text to pass on and the stop string that was completed."""
        if not self._stops or not text:
            return text, None
        seen = self._tail + text
        start = len(self._tail) - self._num_held  # of what has not been passed on
        if can_stop and (match := self._find(seen, len(self._tail))):
            at, stop = match
            end = at + len(stop) if self._include else at
            self._tail, self._num_held = "", 0
            return seen[start:end], stop
        self._num_held = min(self._longest_beginning(seen), len(seen) - start)
        end = len(seen) - self._num_held
        self._tail = seen[max(0, len(seen) - self._overlap) :]
        return seen[start:end], None

    def flush(self) -> str:
        """Return the text held back: no more can come."""
        held = self._tail[len(self._tail) - self._num_held :]
        self._num_held = 0
        return held

    def _find(self, seen: str, num_old: int) -> tuple[int, str] | None:
        """Find the earliest match that ends after the first `num_old` characters."""
        matches = []
        for stop in self._stops:
            at = seen.find(stop, max(0, num_old - len(stop) + 1))
            if at >= 0:
                matches.append((at, stop))
        return min(matches, key=lambda match: match[0], default=None)

    def _longest_beginning(self, text: str) -> int:
        """Count the characters at the end of `text` with which a stop string may begin."""
        longest = 0
        for stop in self._stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while at >= 0 and len(text) - at > longest:
                if stop.startswith(text[at:]):
                    longest = len(text) - at
                    break
                at = text.find(stop[0], at + 1)
        return longest


class TextDelta(NamedTuple):
    """What one update adds to an output."""

    text: str
    samples: tuple[Sample, ...]  # those that belong to the output
    offsets: tuple[int, ...]  # where in the output's text each of them begins
    num_output_tokens: int  # in all; where a stop string matched, up to and with its last token
    matched_stop: str | None  # completed by this update
    finish_reason: FinishReason | None
    stop_reason: int | str | None

    @property
    def token_ids(self) -> list[int]:
        """The ids of the samples."""
        return [sample.token_id for sample in self.samples]


class TextStream:
    """The text of one output as its samples arrive; finds stop strings.

    After a match nothing more is added. Without a tokenizer there is no text, only ids.
    """

    def __init__(
        self,
        tokenizer: Decoder | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        eos_token_ids: frozenset[int],
    ) -> None:
        if tokenizer is None and params.stop_strings:
            raise ValueError("stop strings need a tokenizer, and this model has none.")
        self._detokenizer = (
            None
            if tokenizer is None
            else Detokenizer(tokenizer, prompt_token_ids, params.skip_special_tokens)
        )
        self._include_stop = params.include_stop_str_in_output
        self._scanner = StopScanner(params.stop_strings, self._include_stop)
        self._min_tokens = params.min_tokens
        self._ending_ids = params.ending_ids(eos_token_ids)
        self._num_chars = 0  # decoded so far, what is held back included
        self.num_output_tokens = 0
        self.matched_stop: str | None = None

    def twin(self) -> TextStream:
        """Return one of another output of the prompt, at the same point.

        What the prompt's end spells, which takes longest, is not found out again.
        """
        made = copy.copy(self)
        made._detokenizer = None if self._detokenizer is None else self._detokenizer.twin()
        made._scanner = copy.copy(self._scanner)
        return made

    def push(
        self,
        samples: Sequence[Sample],
        finish_reason: FinishReason | None = None,
        stop_reason: int | None = None,
    ) -> TextDelta:
        """Take the samples of one update; with a finish reason they are the last."""
        pieces: list[str] = []
        offsets: list[int] = []
        had_matched = self.matched_stop is not None
        if not had_matched:
            self._take(samples, finish_reason, pieces, offsets)
        if finish_reason is not None and self.matched_stop is None:
            self._finish(pieces)
        if self.matched_stop is not None and finish_reason is not None:
            finish_reason = FinishReason.STOP
        return TextDelta(
            "".join(pieces),
            tuple(samples[: len(offsets)]),
            tuple(offsets),
            self.num_output_tokens,
            None if had_matched else self.matched_stop,
            finish_reason,
            self.matched_stop if self.matched_stop is not None else stop_reason,
        )

    def _take(
        self,
        samples: Sequence[Sample],
        finish_reason: FinishReason | None,
        pieces: list[str],
        offsets: list[int],
    ) -> None:
        """Decode sample by sample until a stop string is complete."""
        last = len(samples) - 1
        for index, sample in enumerate(samples):
            offsets.append(self._num_chars)
            self.num_output_tokens += 1
            is_ending = (
                index == last
                and finish_reason is FinishReason.STOP
                and sample.token_id in self._ending_ids
            )
            if self._detokenizer is None or (is_ending and not self._include_stop):
                continue
            self._pass_on(self._detokenizer.push(sample.token_id), pieces)
            if self.matched_stop is not None:
                return

    def _pass_on(self, text: str, pieces: list[str]) -> None:
        self._num_chars += len(text)
        can_stop = self.num_output_tokens >= self._min_tokens
        piece, self.matched_stop = self._scanner.push(text, can_stop)
        if piece:
            pieces.append(piece)

    def _finish(self, pieces: list[str]) -> None:
        if self._detokenizer is not None:
            self._pass_on(self._detokenizer.flush(), pieces)
        if self.matched_stop is None:
            pieces.append(self._scanner.flush())
