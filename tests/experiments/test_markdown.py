"""Tables of Markdown in their places."""

from __future__ import annotations

import pytest

from experiments.markdown import fill, markdown, number, ratio, share

DOCUMENT = (
    "before\n<!-- table: a -->\nold\n<!-- end -->\nbetween\n<!-- table: b -->\n<!-- end -->\n"
)


def test_a_table_replaces_the_one_of_its_name_and_nothing_else(tmp_path):
    """The text around the places, and places of other names, stay."""
    document = tmp_path / "page.md"
    document.write_text(DOCUMENT, encoding="utf-8")
    fill(document, {"a": "new\n"})
    assert document.read_text(encoding="utf-8") == DOCUMENT.replace("old", "new")


@pytest.mark.parametrize("text", ["no place\n", DOCUMENT + DOCUMENT])
def test_a_table_without_one_place_is_refused_and_nothing_is_written(tmp_path, text):
    """A name that was mistyped would otherwise leave an old table as if it were new."""
    document = tmp_path / "page.md"
    document.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="not exactly one place for the table 'a'"):
        fill(document, {"a": "new\n"})
    assert document.read_text(encoding="utf-8") == text


def test_a_row_has_a_cell_under_each_heading():
    """Markdown takes the second line for a rule."""
    assert markdown(["x", "y"], [["1", "2"]]) == "| x | y |\n| --- | --- |\n| 1 | 2 |\n"


def test_what_does_not_exist_is_a_dash():
    """A measure that no request has is None in a result."""
    assert [number(None), share(None), ratio(None, 2.0), ratio(2.0, None), ratio(2.0, 0.0)] == [
        "-"
    ] * 5


@pytest.mark.parametrize(
    ("value", "shown"), [(0.5, "0.50"), (1.02, "1.02"), (1.0201, "**1.02**"), (3.0, "**3.00**")]
)
def test_only_what_is_worse_by_more_than_two_percent_is_bold(value, shown):
    """Noise is not marked."""
    assert ratio(value * 4.0, 4.0) == shown
