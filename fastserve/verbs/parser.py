"""The parser of the command line: what it says when a line cannot be understood.

Rules: a complaint is one line, of the verb at which it arose, and names what is near a misspelt
word; of arguments it repeats flags only, for what follows an unknown flag may be a secret.
Must not know: verbs, settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from fastserve.settings.mapping import did_you_mean

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

EXIT_USAGE = 2


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line.

    `takes_words` names the argument, a list, to which words between and after flags belong too.
    """

    takes_words: str | None = None

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is."""
        text = " ".join(message.removeprefix("argument ").split())
        self.exit(EXIT_USAGE, f"fastserve: error: {text} (see {self.prog} --help)\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Leave; what was printed goes out first, so that a closed pipe is found here."""
        if sys.stdout is not None:
            sys.stdout.flush()
        super().exit(status, message)

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        (file or sys.stderr).write(message)  # argparse would let what cannot be printed pass

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse; what is not known is an error of this parser, which knows its own flags."""
        words = list(sys.argv[1:] if args is None else args)
        if self._subparsers is not None and words and self._is_unknown_flag(words[0]):
            self.error(self._named(words[:1], hint="; flags go after the verb"))
        parsed, rest = super().parse_known_args(words, namespace)
        if self.takes_words is not None and not any(word.startswith("-") for word in rest):
            getattr(parsed, self.takes_words).extend(rest)
        elif rest:
            self.error(self._named(rest))
        return parsed, []

    def _is_unknown_flag(self, word: str) -> bool:
        return word.startswith("--") and word not in ("--", *self._option_string_actions)

    def _named(self, rest: Sequence[str], hint: str = "") -> str:
        flags = [word.partition("=")[0] for word in rest if word.startswith("-")]
        near = did_you_mean(flags[0], self._option_string_actions) if flags else ""
        return f"unrecognized arguments: {' '.join(flags or rest)}{near or hint}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = action.choices
        if choices is None or value in choices:
            return
        names = [str(choice) for choice in choices]
        near = did_you_mean(str(value), names) or f" (one of: {', '.join(names)})"
        raise argparse.ArgumentError(action, f"invalid choice {str(value)!r}{near}")
