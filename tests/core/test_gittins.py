"""The Gittins index against its formula, and what it says of the shapes that matter."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from fastserve.core.gittins import LONGEST, AnswerLength
from fastserve.core.lengths import EDGES, NUM_BINS, bin_of

# As bins are taken to be: all that is in one has the length of its middle.
MIDDLES = [(low + high - 1) / 2 for low, high in pairwise(EDGES)]
TINIEST = 5e-324


def spread(weights: dict[int, float]) -> list[float]:
    """Return the probabilities of bins from weights."""
    total = math.fsum(weights.values())
    return [weights.get(index, 0.0) / total for index in range(NUM_BINS)]


def point(num_tokens: int) -> list[float]:
    """Return the distribution of answers that are all in the bin of a length."""
    return spread({bin_of(num_tokens): 1.0})


def exponential(mean: float) -> list[float]:
    """Return an answer that may end at any token alike."""
    ends = [*EDGES[1:], math.inf]
    return [
        math.exp((1 - edge) / mean) - math.exp((1 - end) / mean)
        for edge, end in zip(EDGES, ends, strict=True)
    ]


def outcomes(shares: Sequence[float], max_tokens: int | None) -> list[tuple[float, float]]:
    """Return (length, probability) of each bin; what lies above the limit ends there."""
    last = NUM_BINS - 1 if max_tokens is None else min(bin_of(max_tokens), NUM_BINS - 1)
    kept = [(MIDDLES[k], shares[k]) for k in range(last)]
    return [*kept, (float(max_tokens or EDGES[last]), math.fsum(shares[last:]))]


def brute_index(
    lengths: list[tuple[float, float]],
    index: int,
    first_s: float,
    token_s: float,
    mean_tokens: float,
    exponent: float,
) -> float:
    """Return min over u > e of (first + τ · E[min(O, u) - e]) / E[w(O) · 1{O ≤ u}], O > e.

    An age is the edge of a bin, or the end of all.
    """
    age, after = EDGES[index] - 1, lengths[index:]
    longer = math.fsum(p for _, p in after)
    prices = []
    for k in range(index + 1, len(lengths) + 1):
        until = EDGES[k] - 1 if k < len(lengths) else math.inf
        tokens = math.fsum(p * (min(o, until) - age) for o, p in after) / longer
        ends = [(o, p) for (o, p), _ in zip(after, range(index, k), strict=False)]
        worth = math.fsum(p * (o / mean_tokens) ** -exponent for o, p in ends) / longer
        if worth > 0.0:
            prices.append((first_s + token_s * tokens) / worth)
    return min(prices)


histograms = st.dictionaries(
    st.integers(0, NUM_BINS - 1), st.floats(1e-3, 1.0), min_size=1, max_size=8
).map(spread)
limits = st.none() | st.integers(1, 2 * EDGES[-1])
exponents = st.sampled_from((0.0, 0.3, 1.0)) | st.floats(0.0, 1.0)


@given(
    histograms,
    limits,
    st.floats(0.0, 10.0),
    st.floats(1e-4, 1.0),
    st.floats(1.0, 5e3),
    exponents,
    st.integers(0, NUM_BINS - 1),
)
def test_the_index_is_its_formula(
    shares: list[float],
    max_tokens: int | None,
    first_s: float,
    token_s: float,
    mean_tokens: float,
    exponent: float,
    least_index: int,
) -> None:
    """Of a new answer, at any age and at the last: the least price over all ages beyond it."""
    answer = AnswerLength(shares, max_tokens, mean_tokens=mean_tokens, exponent=exponent)
    lengths = outcomes(shares, max_tokens)
    for index in {0, min(least_index, len(lengths) - 1), len(lengths) - 1}:
        if math.fsum(p for _, p in lengths[index:]) > 1e-12:
            brute = brute_index(lengths, index, first_s, token_s, mean_tokens, exponent)
            assert answer.index(index, first_s, token_s) == pytest.approx(brute, rel=1e-6)


@given(histograms, limits)
def test_tokens_left_is_the_mean_of_what_is_still_to_come(
    shares: list[float], max_tokens: int | None
) -> None:
    """Of the answers that go beyond an age: their mean length less that age."""
    answer, lengths = AnswerLength(shares, max_tokens), outcomes(shares, max_tokens)
    for index in range(len(lengths)):
        longer = math.fsum(p for _, p in lengths[index:])
        if longer > 1e-12:
            mean = math.fsum(p * o for o, p in lengths[index:]) / longer
            assert answer.tokens_left(index) == pytest.approx(mean - EDGES[index] + 1)


@given(limits, st.integers(0, 3 * EDGES[-1]))
def test_an_age_is_in_one_bin_until_its_end(max_tokens: int | None, num_tokens: int) -> None:
    """Tokens that are out put the next one into a bin; there is none beyond that of the limit."""
    answer = AnswerLength(exponential(100.0), max_tokens)
    index, last = answer.bin_at(num_tokens), bin_of(max_tokens or LONGEST)
    assert index == min(bin_of(num_tokens + 1), last)
    end = answer.end_of(index)
    assert end > num_tokens
    if index < last:
        assert (answer.bin_at(end - 1), answer.bin_at(end)) == (index, index + 1)
    else:
        assert end == LONGEST


def test_a_limit_ends_what_would_be_longer() -> None:
    """Under a limit of 10 an answer of 1000 is one of 10, and one of 5 stays."""
    both = spread({bin_of(5): 1.0, bin_of(1000): 1.0})
    answer = AnswerLength(both, 10)
    assert answer.tokens_left(0) == pytest.approx((5 + 10) / 2)
    assert answer.index(answer.bin_at(9), 0.0, 2.0) == pytest.approx(2.0)
    assert AnswerLength(both, 1).tokens_left(0) == 1.0
    assert AnswerLength(both, 1).index(0, 3.0, 2.0) == pytest.approx(5.0)


def test_a_known_length_costs_the_work_that_is_left() -> None:
    """The prefill and each token still to come, until the bin of the end."""
    num_tokens = 200
    answer = AnswerLength(point(num_tokens))
    last, middle = bin_of(num_tokens), MIDDLES[bin_of(num_tokens)]
    for index in range(last + 1):
        left = middle - EDGES[index] + 1
        assert answer.index(index, 7.0, 0.5) == pytest.approx(7.0 + 0.5 * left)
        assert answer.tokens_left(index) == pytest.approx(left)


def test_an_answer_that_may_end_at_any_token_never_becomes_dearer() -> None:
    """Without a prefill the index of an exponential length is τ · mean at every age, but for what
    bins round; the prefill is paid by all tokens that may follow it.
    """
    answer = AnswerLength(exponential(300.0))
    prices = [answer.index(index, 0.0, 1.0) for index in range(bin_of(1000))]
    assert prices == pytest.approx([300.0] * len(prices), rel=0.05)
    assert answer.index(0, 100.0, 1.0) == pytest.approx(400.0, rel=0.05)


def test_of_a_heavy_tail_the_old_are_dear() -> None:
    """What has gone on for long will go on for long: the index grows with age."""
    shares = spread({index: EDGES[index] ** -0.7 for index in range(bin_of(50_000))})
    answer = AnswerLength(shares)
    prices = [answer.index(index, 0.0, 1.0) for index in range(8, bin_of(10_000), 4)]
    assert prices == sorted(prices)
    assert prices[-1] > 20 * prices[0]


def test_most_short_answers_make_a_new_one_cheap() -> None:
    """Nine of 10 tokens and one of 1000: looking until the first bin's end is what it costs."""
    answer = AnswerLength(spread({bin_of(10): 9.0, bin_of(1000): 1.0}))
    until = EDGES[bin_of(10) + 1] - 1
    cheap = (9 * MIDDLES[bin_of(10)] + until) / 9
    assert answer.index(0, 0.0, 1.0) == pytest.approx(cheap)
    assert answer.index(answer.bin_at(until), 0.0, 1.0) > 50 * cheap


def test_what_counts_is_the_answer_or_its_tokens() -> None:
    """β = 0: 100 tokens cost 100. β = 1: an answer of half the mean is worth two, so the price of
    a known length is its square over the mean.
    """
    length, mean = MIDDLES[bin_of(100)], 400.0
    plain = AnswerLength(point(100), mean_tokens=mean)
    by_token = AnswerLength(point(100), mean_tokens=mean, exponent=1.0)
    assert plain.index(0, 0.0, 1.0) == pytest.approx(length)
    assert by_token.index(0, 0.0, 1.0) == pytest.approx(length * length / mean)


@given(
    histograms,
    limits,
    exponents,
    st.lists(st.integers(0, NUM_BINS - 1), max_size=30),
    st.sampled_from((0.0, 1e-3, 0.5)),
)
@example(exponential(0.8), None, 0.0, [], 0.0)
@example(exponential(5.0), 5000, 0.3, [], 0.0)
def test_a_price_is_a_price_at_every_age(
    shares: list[float],
    max_tokens: int | None,
    exponent: float,
    unlikely: list[int],
    first_s: float,
) -> None:
    """Positive and finite, also where it was as good as certain that the answer had ended."""
    for index in unlikely:
        shares[index] = shares[index] or TINIEST
    answer = AnswerLength(shares, max_tokens, mean_tokens=0.8, exponent=exponent)
    for index in range(answer.bin_at(LONGEST - 1) + 1):
        assert 0.0 < answer.index(index, first_s, 1e-6) < math.inf
        assert 1.0 - 1e-9 <= answer.tokens_left(index) < math.inf


def test_lengths_from_the_distribution_are_uniform_in_it() -> None:
    """Where a prediction is right, the share below an answer falls into each decile alike."""
    rng, shares = random.Random(5), exponential(300.0)
    answer = AnswerLength(shares)
    counts = [0] * 10
    for _ in range(20_000):
        num_tokens = 1 + int(rng.expovariate(1 / 300.0))
        counts[min(int(answer.share_below(num_tokens) * 10), 9)] += 1
    assert all(1200 < count < 2800 for count in counts)
    below = [answer.share_below(n) for n in (1, 10, 100, 1000, 10_000, 4 * EDGES[-1])]
    assert below == sorted(below)
    assert below[0] >= 0.0
    assert below[-1] <= 1.0


def test_half_of_the_own_bin_is_below() -> None:
    """By hand: a quarter is shorter, the bin has a half."""
    answer = AnswerLength(spread({0: 1.0, 3: 2.0, 9: 1.0}))
    assert answer.share_below(EDGES[3]) == pytest.approx(0.5)
    assert answer.share_below(1) == pytest.approx(0.125)
    assert answer.share_below(EDGES[9]) == pytest.approx(0.875)
