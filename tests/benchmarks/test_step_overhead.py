"""The figures of two checkouts in turns."""

from __future__ import annotations

from benchmarks.step_overhead import figures, in_turns


def test_sides_take_turns_and_each_begins_as_often() -> None:
    """A B, B A, and so on."""
    assert list(in_turns(("a", "b"), 3)) == [("a", "b"), ("b", "a"), ("a", "b")]


def test_a_ratio_is_taken_within_a_round() -> None:
    """A machine that becomes slower for both changes none."""
    a = [{"wall": 100.0}, {"wall": 400.0}, {"wall": 200.0}]
    b = [{"wall": 80.0}, {"wall": 320.0}, {"wall": 100.0}]
    assert figures(a, b) == {
        "wall": {"a_us": 200.0, "b_us": 100.0, "ratio": 0.8, "least": 0.5, "most": 0.8}
    }
