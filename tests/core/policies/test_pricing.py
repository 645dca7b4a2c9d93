"""Pricing: how far a price moves a request ahead of its arrival."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from fastserve.core.policies.pricing import NO_BOOST, boost_s


def test_the_less_is_expected_the_further_ahead() -> None:
    """b(G) falls from without bound to nothing, and is what the docstring says in between."""
    prices = [10.0**exponent for exponent in range(-6, 3)]
    boosts = [boost_s(price, 2.0) for price in prices]
    assert all(first > second for first, second in pairwise(boosts) if first)
    assert boosts[0] > 20.0
    assert boosts[-1] == 0.0
    assert boost_s(3.0, 2.0) == pytest.approx(-2.0 * math.log(1.0 - math.exp(-1.5)))


def test_without_work_in_the_system_arrivals_alone_decide() -> None:
    """1/γ = 0 is first come, first served; a price of many times 1/γ is as good as that."""
    assert boost_s(1e-9, 0.0) == 0.0
    assert boost_s(2.0 * NO_BOOST, 2.0) == 0.0
