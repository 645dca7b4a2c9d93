"""Tables of Markdown, and their places in a document.

Rules: a table replaces what stands between `<!-- table: NAME -->` and the next `<!-- end -->`, and
nothing else of the document. Must not know: what is in a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

WORSE = 1.02  # ratios beyond are bold


def fill(document: Path, tables: Mapping[str, str]) -> None:
    """Write tables to their places. Raises ValueError for one without exactly one place."""
    text = document.read_text(encoding="utf-8")
    for name, table in tables.items():
        opening = f"<!-- table: {name} -->\n"
        if text.count(opening) != 1:
            raise ValueError(f"{document}: not exactly one place for the table {name!r}")
        before, _, rest = text.partition(opening)
        _, end, after = rest.partition("<!-- end -->")
        text = before + opening + table + end + after
    document.write_text(text, encoding="utf-8")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def number(value: float | None) -> str:
    """Return three digits for people; a dash for what does not exist."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def share(value: float | None) -> str:
    """Return a ratio; bold where it is worse than 1 by more than 2 %."""
    if value is None:
        return "-"
    return f"**{value:.2f}**" if value > WORSE else f"{value:.2f}"


def ratio(value: float | None, base: float | None) -> str:
    """Return value / base as `share` does; a dash where one of them is missing or the base is 0."""
    return share(quotient(value, base))


def quotient(value: float | None, base: float | None) -> float | None:
    """Return value / base; None where one of them is missing or the base is 0."""
    return None if value is None or not base else value / base
