"""A process that is measured, told over a pipe what to compute: both ends of the pipe.

Rules: one question at a time, a line of JSON each way; whoever is not asked waits in a read and
takes no core. What a contender prints besides answers goes to stderr. The standard library only: a
contender may run in an environment of its own.
Must not know: what computes, what is compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Answers = Mapping[str, Callable[..., Mapping[str, Any]]]


class ContenderError(Exception):
    """A contender ended before it answered; what it printed tells why."""


class Contender:
    """A child process that answers questions; leaving its context ends it."""

    def __init__(
        self, name: str, command: Sequence[str], directory: Path, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        """Return the number of the process."""
        return self._process.pid

    def ask(self, question: str, **details: Any) -> dict[str, Any]:
        """Return the answer. Raises ContenderError where none comes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"question": question, **details}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which the read below says too
        line = self._process.stdout.readline()
        if not line:
            raise ContenderError(f"{self.name} ended with {self._process.wait()}")
        return dict(json.loads(line))

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the process: it reads the end of its input, or is killed."""
        try:
            self._process.communicate(timeout=None if error is None else 0)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.communicate()


def serve(answers: Answers) -> None:
    """Answer the questions of this process' input until it ends."""
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)  # what libraries print is no answer
        for line in sys.stdin:
            details = json.loads(line)
            answer = answers[details.pop("question")](**details)
            output.write(json.dumps(answer) + "\n")
            output.flush()
