"""The table of docs/replicas.md, from entries of known numbers."""

from __future__ import annotations

from typing import Any

from experiments.replicas import POLICIES, QUEUES, as_table, draws_table, rows_of


def entry(policy: str, queue: str, mean_s: float) -> dict[str, Any]:
    """Return what the experiment keeps of one simulation."""
    return {"trace": "t", "replicas": 2, "rows": 1600, "policy": policy, "queue": queue,
            "jct_s": {"mean": mean_s, "p99": 4 * mean_s**2}}  # fmt: skip


def test_the_router_is_compared_with_one_queue() -> None:
    """Ratios of means and of tails, each policy with itself."""
    entries = [
        entry(policy, queue, mean_s)
        for policy, means in zip(POLICIES, ((3.0, 2.0), (1.05, 1.0)), strict=True)
        for queue, mean_s in zip(QUEUES, means, strict=True)
    ]
    lines = as_table(entries).splitlines()
    assert lines[0].startswith("| trace | replicas | rows | `fcfs`, mean | `fcfs`, P99 | `lea")
    assert lines[2:] == ["| t | 2 | 1,600 | 1.50 | 2.25 | 1.05 | 1.10 |"]


def test_draws_are_compared_one_by_one() -> None:
    """The mean of their ratios, not the ratio of their means."""
    entries = [
        {**entry(policy, queue, mean_s), "draw": draw}
        for policy in POLICIES
        for draw, means in enumerate(((1.0, 2.0), (300.0, 200.0)))
        for queue, mean_s in zip(QUEUES, means, strict=True)
    ]
    lines = draws_table(entries).splitlines()
    assert lines[0] == "| policy | draw 0 | draw 1 | mean |"
    assert lines[2:] == [f"| `{policy}` | 0.50 | 1.50 | 1.00 |" for policy in POLICIES]


def test_more_replicas_are_given_more_rows() -> None:
    """As many turns of each batch, and enough for a mean where there are few."""
    assert [rows_of(size) for size in (2, 8, 64)] == [600, 600, 4800]
