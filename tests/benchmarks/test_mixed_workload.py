"""The mix of short and long requests, and the lengths of a trace."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from benchmarks.mixed_workload import (
    LONG_TOKENS,
    SHORT_TOKENS,
    Lengths,
    draw_mix,
    draw_workload,
    is_short,
    trace_lengths,
    with_prompts,
)


def test_shares_and_lengths_are_exact():
    """One request in ten is long, and every length lies in its range."""
    lengths = [each.output for each in draw_mix(seed=3, count=400, long_share=0.1)]
    longs = [length for length in lengths if not is_short(length)]
    assert len(lengths) == 400
    assert len(longs) == 40
    assert all(LONG_TOKENS[0] <= length <= LONG_TOKENS[1] for length in longs)
    assert all(SHORT_TOKENS[0] <= n <= SHORT_TOKENS[1] for n in lengths if is_short(n))


def test_the_rate_moves_arrivals_and_nothing_else():
    """The same seed gives the same requests at any rate; gaps are exponential with its mean."""
    lengths = [Lengths(1, 1)] * 2000
    slow, fast = (draw_workload(3, lengths, rate) for rate in (2.0, 4.0))
    assert slow.requests == fast.requests
    assert [due / 2 for due in slow.due_s] == pytest.approx(fast.due_s)
    gaps = [after - before for before, after in zip(slow.due_s, slow.due_s[1:], strict=False)]
    assert fmean(gaps) == pytest.approx(0.5, rel=0.1)
    assert fmean(gap**2 for gap in gaps) == pytest.approx(0.5, rel=0.2)  # E[X²] = 2/rate²


def test_prompts_have_their_length_and_are_never_the_same():
    """So the prefix cache of a server that is asked twice finds nothing."""
    lengths = [Lengths(20, 5, "a"), Lengths(7, 6)] * 2
    asked = list(with_prompts(random.Random(0), lengths))
    assert [len(each.prompt_token_ids) for each in asked] == [20, 7, 20, 7]
    assert [(each.num_output_tokens, each.client) for each in asked] == [(5, "a"), (6, "")] * 2
    assert len({tuple(each.prompt_token_ids) for each in asked}) == 4


def test_a_trace_is_cut_to_the_window(tmp_path):
    """Its first rows, in order, with their clients; what is too long loses answer first."""
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "arrived_at,prompt_tokens,output_tokens,client_id\n"
        "0,13,199,13\n1,70,60,2\n2,300,5,13\n3,1,1,4\n"
    )
    found = trace_lengths(trace, count=3, window=100)
    assert found == [Lengths(13, 87, "13"), Lengths(70, 30, "2"), Lengths(99, 1, "13")]


def test_a_trace_without_clients(tmp_path):
    """Nobody is named."""
    trace = tmp_path / "trace.csv"
    trace.write_text("arrived_at,prompt_tokens,output_tokens\n0,3,4\n")
    assert trace_lengths(trace, count=9, window=100) == [Lengths(3, 4, "")]
