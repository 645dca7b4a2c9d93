"""What verbs show to people: lines, tables and bars that fit a terminal, and pipes without them.

Rules: at a terminal lines break between words and a narrow table goes without its frame; in a pipe
lines and rows stay whole and no bar is drawn. Must not know: what is shown.
"""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, ProgressColumn
from rich.table import Table

NARROW = 64  # columns below which the frame of a table costs too many of them
BOUNDLESS = 10_000  # columns of what is no terminal


def say(text: str, *, style: str | None = None, stderr: bool = True) -> None:
    """Write a line about the run."""
    console = Console(stderr=stderr, highlight=False, markup=False)
    console.print(text, style=style, soft_wrap=not console.is_terminal)


def make_bar(*columns: str | ProgressColumn) -> Progress:
    """Return a progress bar that goes when it is done; in a pipe it never comes."""
    console = Console(stderr=True)
    return Progress(
        *columns,
        console=console,
        transient=True,
        refresh_per_second=2,
        disable=not console.is_terminal,
    )


def make_table(
    *headings: str, title: str, caption: str | None = None, width: int | None = None
) -> Table:
    """Return a table of figures, none of which is ever cut off; `width` is the terminal's."""
    table = Table(title=escape(title), caption=caption)
    if (width or Console().width) < NARROW:
        table.box, table.padding, table.pad_edge = None, (0, 1, 0, 0), False
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def print_table(table: Table) -> None:
    """Print a table to stdout: as wide as the terminal at most, in a pipe as wide as it is."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=BOUNDLESS)
    console.print(table)
