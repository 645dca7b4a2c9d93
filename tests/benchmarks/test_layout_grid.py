"""The table of what layouts compute, from a report of known cases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.layout_grid import as_table, cells_of, read_cases

CASE = (
    '<testcase name="test_requests_{way}_are_those_of_one_process[{model}-tp2-pp1]">'
    "<properties>{properties}</properties>{outcome}</testcase>"
)


def case(way: str, model: str, told: Mapping[str, float], outcome: str = "") -> str:
    """Return one test of a report."""
    properties = "".join(f'<property name="{n}" value="{v}"/>' for n, v in told.items())
    return CASE.format(way=way, model=model, properties=properties, outcome=outcome)


def test_ways_of_a_cell_are_taken_together(tmp_path: Path) -> None:
    """Sums of what is counted, the largest difference; what failed is not in the table."""
    told = {"requests": 9, "requests_with_equal_tokens": 9, "steps_in_flight": 1}
    cases = [
        case("in_chunks", "opt", {**told, "max_logprob_difference": 1e-6}),
        case("that_are_swapped", "opt", {**told, "max_logprob_difference": 3e-6,
                                         "moves_checked": 70, "moves_that_differ": 0}),
        case("in_chunks", "llama", {**told, "max_logprob_difference": 2e-6}),
        case("that_are_swapped", "llama", told, "<failure/>"),
        '<testcase name="test_of_something_else"/>',
    ]  # fmt: skip
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    cells = cells_of(list(read_cases(report)))
    assert [(cell["model"], cell["ways"], cell["requests"]) for cell in cells] == [
        ("llama", 1, 9),
        ("opt", 2, 18),
    ]
    (row,) = as_table(cells).splitlines()[2:]
    assert row == "| 2 × 1 | 27 of 27 | 1 | 2.0e-06 | 3.0e-06 | 0 | 70 | 0 |"
