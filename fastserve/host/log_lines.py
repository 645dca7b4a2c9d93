"""Lines of the log: nothing that is shown in one can begin another.

Names, paths, headers and what libraries say of them come from clients, without a key perhaps.
Rules: what a message holds that is no printable character is shown as its escape; a traceback
follows in lines that begin with a mark, as no message does. Must not know: who logs what.
"""

from __future__ import annotations

import logging
import re

FORMAT = "%(asctime)s %(levelname)s %(message)s"  # a request's line fits 80 columns
TIME = "%Y-%m-%d %H:%M:%S"
TRACEBACK_MARK = "| "
# Control characters, the two other ends of a line, and what turns the direction of a text.
UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def one_line(text: str) -> str:
    """Return a text with the escapes of what would end its line, or change how it looks."""
    return UNSHOWN.sub(lambda found: ascii(found[0])[1:-1], text)


class LineFormatter(logging.Formatter):
    """Formats each message as one line, and a traceback as marked lines behind it."""

    def __init__(self) -> None:
        super().__init__(FORMAT, TIME)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line of a message."""
        return one_line(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, and its traceback."""
        line, *traceback = super().format(record).split("\n")
        return "\n".join((line, *(TRACEBACK_MARK + one_line(text) for text in traceback)))
