"""The tables of docs/kv-memory.md, from entries of known numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.kv_tier_tables import bytes_table, ideal_table, mode_table, write_tables

MODES = {"recompute": 2.0, "reactive": 1.05, "proactive": 1.01, "ideal": 1.0}


def entry(policy: str, mode: str, load: float, mean_s: float) -> dict[str, Any]:
    """Return what the experiment keeps of one simulation."""
    moved = {f"{name}_bytes": 2e9 for name in ("swap_in", "swap_out", "saved", "fetched", "wasted")}
    return {
        "setup": "m", "trace": "t", "load": load, "policy": policy, "mode": mode,
        "jct_s": {"mean": mean_s, "p99": 3 * mean_s}, "preemptions": 12, "recomputed_tokens": 0,
        "breakdown_s": {"swap": 0.004}, "copy_wait_s": 0.5, "makespan_s": 100.0,
        "link_in_share": 0.25, "link_out_share": 0.5, **moved,
    }  # fmt: skip


ENTRIES = [
    entry(policy, mode, load, base_s * factor)
    for load in (0.7, 1.0)
    for policy, base_s in (("fcfs", 10.0), ("learned", 5.0))
    for mode, factor in MODES.items()
]
CAPACITY = {"m": {"t": 4.0}}


def test_modes_are_compared_with_fcfs_that_recomputes() -> None:
    """Its own cell has seconds, all others shares of it."""
    lines = mode_table(ENTRIES, CAPACITY).splitlines()
    assert lines[2] == (
        "| m | t | 0.7 (2.8) | fcfs | 20 s; 60 s | 0.53; 0.53 | 0.51; 0.51 | 0.50; 0.50 |"
    )
    assert lines[3].startswith("| m | t | 0.7 (2.8) | learned | 0.50; 0.50 | 0.26; 0.26 |")
    assert len(lines) == 2 + 4


def test_modes_that_swap_are_compared_with_the_ideal_link() -> None:
    """Of the same policy and load, one row per policy."""
    lines = ideal_table(ENTRIES).splitlines()
    assert lines[2] == "| m | t | fcfs | **1.05** / **1.05** | 1.01 / 1.01 |"
    assert len(lines) == 2 + 2


def test_bytes_are_shown_for_what_moves() -> None:
    """At the highest load, the modes that swap alone."""
    lines = bytes_table(ENTRIES).splitlines()
    assert len(lines) == 2 + 4
    assert lines[2] == (
        "| m | t | fcfs | reactive | 12 | 2 | 2 | 2 | 2 | 2 | 50 % / 25 % | 4 ms | 0.5 % | 0 |"
    )


def test_tables_are_written_to_their_places(tmp_path: Path) -> None:
    """Each between its markers; what is around them stays."""
    file, document = tmp_path / "kv_tiers.json", tmp_path / "page.md"
    figures = {"capacity": CAPACITY, "entries": ENTRIES}
    file.write_text(json.dumps({"figures": figures}), encoding="utf-8")
    places = [
        f"<!-- table: {name} -->\nold\n<!-- end -->\n" for name in ("modes", "ideal", "bytes")
    ]
    document.write_text("before\n" + "".join(places) + "after\n", encoding="utf-8")
    write_tables(file, document)
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("| machine |") == 3
