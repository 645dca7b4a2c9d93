"""The mix of short and long requests."""

from __future__ import annotations

from statistics import fmean

import pytest

from benchmarks.mixed_workload import LONG_TOKENS, SHORT_TOKENS, draw_workload, is_short


def test_shares_and_lengths_are_exact():
    """One request in ten is long, and every length lies in its range."""
    requests = draw_workload(seed=3, count=400, long_share=0.1, rate=2.0).requests
    lengths = [request.num_output_tokens for request in requests]
    longs = [length for length in lengths if not is_short(length)]
    assert len(lengths) == 400
    assert len(longs) == 40
    assert all(LONG_TOKENS[0] <= length <= LONG_TOKENS[1] for length in longs)
    assert all(SHORT_TOKENS[0] <= n <= SHORT_TOKENS[1] for n in lengths if is_short(n))


def test_the_rate_moves_arrivals_and_nothing_else():
    """The same seed gives the same requests at any rate; gaps are exponential with its mean."""
    slow = draw_workload(seed=3, count=2000, long_share=0.1, rate=2.0)
    fast = draw_workload(seed=3, count=2000, long_share=0.1, rate=4.0)
    assert slow.requests == fast.requests
    assert [due / 2 for due in slow.due_s] == pytest.approx(fast.due_s)
    gaps = [after - before for before, after in zip(slow.due_s, slow.due_s[1:], strict=False)]
    assert fmean(gaps) == pytest.approx(0.5, rel=0.1)
    assert fmean(gap**2 for gap in gaps) == pytest.approx(0.5, rel=0.2)  # E[X²] = 2/rate²
