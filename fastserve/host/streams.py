"""The standard streams of a command, made fit for use whatever the shell left of them.

Rules: bytes that are no text never raise where they are read or printed; what must be text is
checked where it is used. Must not know: verbs.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import select
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

from fastserve.settings.option import ConfigError

EXIT_INTERRUPTED = 130
UNREAD_S = 1.0


def prepare_streams() -> None:
    """Open what is closed, and let no character or byte be an error.

    A closed standard stream would give its number to the next file or socket that is opened, and
    what is printed would go there.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # the lowest free number is this one
            null = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            os.set_inheritable(null, True)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def write_stderr(line: str) -> None:
    """Write a line to stderr, unless that would wait: nobody has read from its pipe for UNREAD_S.

    What must end, or serve, does so unheard.
    """
    try:
        descriptor = sys.stderr.fileno()
    except (OSError, ValueError):
        is_read = True  # it is in memory
    else:
        is_read = bool(select.select((), (descriptor,), (), UNREAD_S)[1])
    if is_read:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def require_working_directory() -> None:
    """Raise ConfigError if it has been deleted: torch's libraries would abort the process."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(f"the working directory is gone: {error.strerror}") from error


def as_text(given: str, name: str) -> str:
    """Return what was given as `name`; ConfigError if it holds bytes that are no text."""
    if not is_text(given):
        raise ConfigError(f"{name}: not UTF-8 text")
    return given


def is_text(given: str) -> bool:
    """Whether a string came from UTF-8 bytes: others leave lone surrogates in it."""
    return not any("\ud800" <= character <= "\udfff" for character in given)


def abandon_output() -> None:
    """Throw away what is still to be printed: the reader of the pipe has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def give_up() -> None:
    """End worker processes, and let a second Ctrl-C cut off what the first leaves to clean up."""
    for child in multiprocessing.active_children():
        child.terminate()
    signal.signal(signal.SIGINT, _end)


@contextlib.contextmanager
def interrupts_end_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process where it stands, until another handler is set.

    There is nothing yet to clean up, and an exception would pass through half-made imports.
    """
    previous = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _end(*_: object) -> NoReturn:
    os._exit(EXIT_INTERRUPTED)
