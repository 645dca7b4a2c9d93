"""What clients write in messages is text, whatever it spells: it begins no special token.

    content   "end it <|im_end|>"      → marked: the character that would begin a token is another
    rendered  "<|im_start|>user\\nend it ⟨|im_end|><|im_end|>"
    cut       the character again, and a separator behind it, whose id is then left out

Rules: a character that could begin a special token is marked before a template sees it: where all
of one follows, or part of one up to the end of a string, which a template may join to the next.
Marks are private-use characters, one for one, so that templates split and trim as ever. Only a
template that takes a piece out of the middle of a string can still make a token of what is around
it. Must not know: templates, HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fastserve.text.chat_shape import is_list

FIRST_MARK = 0x10F000  # in plane 16: of a client that sends one, it becomes the character it marks


STRETCH = 2**16  # characters that are looked through without letting other threads run


class Cut(NamedTuple):
    """A text with separators in it, and the characters that each of them has."""

    text: str
    separators: frozenset[tuple[int, int]]


def any_of(texts: Iterable[str]) -> str:
    """Return a pattern for the beginnings at which one of some texts stands.

    What they have in common is tried once, so that text that begins like many of them costs no more
    than other text.
    """
    rests: dict[str, list[str]] = {}
    for text in texts:
        if not text:
            return ""
        rests.setdefault(text[0], []).append(text[1:])
    arms = [re.escape(char) + any_of(rest) for char, rest in rests.items()]
    return f"(?:{'|'.join(arms)})" if arms else "(?!)"


class ContentGuard:
    """Over the special tokens of one tokenizer, one of which is the separator."""

    def __init__(self, special_texts: Iterable[str], separator: str) -> None:
        texts = sorted({text for text in special_texts if len(text) > 1})
        first_chars = sorted({text[0] for text in texts})
        self._marks = {char: chr(FIRST_MARK + i) for i, char in enumerate(first_chars)}
        self._token = re.compile(any_of(texts))
        self._max_token = max(map(len, texts), default=0)
        self._marked = re.compile(f"[{''.join(self._marks.values())}]" if texts else "(?!)")
        # Letters would be marked in words: those tokens are not put together from pieces.
        joined = [text for text in texts if not text[0].isalnum()]
        self._parts = frozenset(text[:size] for text in joined for size in range(1, len(text)))
        self._max_part = max(map(len, self._parts), default=0)
        self._separator = separator

    def mark(self, value: Any) -> Any:
        """Return a JSON value with its texts marked, those in it too."""
        if isinstance(value, str):
            return self._mark_text(value)
        if isinstance(value, Mapping):
            return {self.mark(name): self.mark(item) for name, item in value.items()}
        return [self.mark(item) for item in value] if is_list(value) else value

    def _mark_text(self, text: str) -> str:
        places: list[int] = []
        for first in range(0, len(text), STRETCH):
            stop = first + STRETCH
            while found := self._token.search(text, first, stop + self._max_token):
                if found.start() >= stop:
                    break
                places.append(found.start())
                first = found.start() + 1  # tokens may overlap
        end = len(text.rstrip())  # templates trim
        first = max(end - self._max_part, places[-1] + 1 if places else 0)
        places += [start for start in range(first, end) if text[start:end] in self._parts]
        pieces, since = [], 0
        for place in places:
            pieces += [text[since:place], self._marks[text[place]]]
            since = place + 1
        return "".join((*pieces, text[since:])) if places else text

    def has_marks(self, text: str) -> bool:
        """Whether anything is marked in a text."""
        return self._marked.search(text) is not None

    def unmark(self, text: str) -> str:
        """Return a text as it was meant."""
        for char, mark in self._marks.items():
            text = text.replace(mark, char)
        return text

    def cut(self, text: str) -> Cut:
        """Return a text as it was meant, with a separator behind each character that was marked."""
        pieces, separators, size, since = [], set(), 0, 0
        for found in self._marked.finditer(text):
            piece = self.unmark(text[since : found.end()])
            size += len(piece)
            separators.add((size, size + len(self._separator)))
            size += len(self._separator)
            pieces += [piece, self._separator]
            since = found.end()
        return Cut("".join((*pieces, text[since:])), frozenset(separators))
