"""The bar of `bench serve`: the share of the tokens asked for that came, and the requests done.

Rules: counting a piece is one addition, so that the bar does not slow the client it belongs to; a
bar is for a terminal and leaves nothing behind. Must not know: HTTP, figures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fastserve.bench.requests import Planned


class Phase(NamedTuple):
    """What is under way."""

    task: TaskID
    num_requests: int
    num_tokens: int


class Meter(Progress):
    """Counts, and draws what was counted when it is refreshed."""

    def __init__(self, console: Console, *, is_shown: bool) -> None:
        self.num_pieces = self.num_done = 0
        self.phase: Phase | None = None
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:.0f}%"),
            TextColumn("{task.fields[done]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            expand=True,
            refresh_per_second=2,
            disable=not (is_shown and console.is_terminal),
        )

    @contextlib.contextmanager
    def following(self, name: str, requests: Sequence[Planned]) -> Iterator[None]:
        """Show these requests while the block runs."""
        num_tokens = sum(request.num_output_tokens for request in requests)
        task = self.add_task(name, total=num_tokens, done="", visible=bool(requests))
        self.num_pieces = self.num_done = 0
        self.phase = Phase(task, len(requests), num_tokens)
        try:
            yield
        finally:
            self.phase = None
            self.remove_task(task)

    def count_piece(self) -> None:
        """See a piece of an answer: a token, or a few."""
        self.num_pieces += 1

    def count_done(self) -> None:
        """See the end of a request, answered or lost."""
        self.num_done += 1

    @property
    def num_tokens(self) -> int:
        """Tokens that came, at least: a piece may hold several, and one that is lost is over."""
        if self.phase is None:
            return 0
        ended = self.phase.num_tokens * self.num_done // max(1, self.phase.num_requests)
        return min(self.phase.num_tokens, max(self.num_pieces, ended))

    def get_renderables(self) -> Iterable[RenderableType]:
        """Draw the counts."""
        if self.phase is not None:
            done = f"{self.num_done}/{self.phase.num_requests}"
            self.update(self.phase.task, completed=self.num_tokens, done=done)
        yield from super().get_renderables()
