"""The tables of the workloads experiment, from figures made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.workload_tables import (
    geometric_mean,
    kv_seed_table,
    kv_table,
    seed_table,
    summary_table,
)

FIGURES = ("jct_s", "normalized_latency_s", "ttft_s", "max_gap_s")


def make_entry(trace: str, policy: str, seconds: float, **labels: Any) -> dict[str, Any]:
    """Return one whose every figure is the same."""
    figures = {name: {"mean": seconds, "p99": seconds} for name in FIGURES}
    return {"part": "policy", "trace": trace, "policy": policy, "load": 1.0} | figures | labels


def row_of(table: str, *begins: str) -> list[str]:
    """Return the cells of the row that begins so, without these."""
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()]
    (found,) = [row for row in cells if tuple(row[: len(begins)]) == begins]
    return found[len(begins) :]


def test_a_summary_is_of_ratios_and_not_of_seconds():
    """A trace of long requests weighs no more than one of short ones."""
    entries = [
        make_entry("short", "fcfs", 1.0), make_entry("short", "learned", 0.5),
        make_entry("long", "fcfs", 100.0), make_entry("long", "learned", 200.0),
        make_entry("short", "srpt", 0.25), make_entry("long", "srpt", 100.0),
    ]  # fmt: skip
    table = summary_table(entries)
    assert row_of(table, "JCT, mean", "learned") == ["1.00 (**2.00**)"]
    assert row_of(table, "JCT, mean", "learned over srpt") == ["**2.00** (**2.00**)"]
    assert row_of(table, "longest gap P99, s", "learned") == ["10 (200)"]


def test_draws_are_spread_around_the_arrivals_of_the_trace():
    """Each draw is measured by FCFS on the same draw."""
    entries = [make_entry("a", "fcfs", 1.0), make_entry("a", "learned", 0.9),
               make_entry("other", "fcfs", 1.0), make_entry("other", "learned", 9.0)]  # fmt: skip
    for seed, fcfs, learned in ((1, 2.0, 1.0), (2, 4.0, 8.0)):
        labels: dict[str, Any] = {"part": "seeds", "seed": seed}
        entries += [make_entry("a", "fcfs", fcfs, **labels),
                    make_entry("a", "learned", learned, **labels)]  # fmt: skip
    table = seed_table(entries)
    assert row_of(table, "a") == ["- / 0.50–**2.00**"]
    assert row_of(table, "**geometric mean of 1**") == ["- / 0.50–**2.00**"]


def test_draws_where_kv_is_short_are_ratios_to_fcfs_on_the_same_draw():
    """The mean is that of ratios, and the span says how far to trust it."""
    entries = []
    for seed, fcfs, learned in ((0, 2.0, 1.0), (1, 4.0, 8.0)):
        labels: dict[str, Any] = {"part": "kv-seeds", "seed": seed}
        entries += [make_entry("a", "fcfs", fcfs, **labels),
                    make_entry("a", "learned", learned, **labels)]  # fmt: skip
    assert row_of(kv_seed_table(entries), "a", "2") == ["; ".join(["1.00 (0.50–**2.00**)"] * 2)]


def test_a_part_that_was_not_measured_has_no_rows():
    """Parts are measured one by one."""
    assert seed_table([]) == "| trace |\n| --- |\n"
    assert kv_table([], {}).count("\n") == 2
    assert kv_seed_table([]).count("\n") == 2


@pytest.mark.parametrize("values", [[], [1.0, 0.0]])
def test_there_is_no_geometric_mean_of_nothing_or_of_zero(values):
    """A ratio of 0 would make all others vanish."""
    assert geometric_mean(values) is None
