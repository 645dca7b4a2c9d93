"""The fit of the cost model: exact where it can be, optimal and non-negative elsewhere."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fastserve.core.cost_model import TERMS, CostModel, step_terms
from fastserve.executor.fitting import (
    Measurement,
    fit,
    non_negative_least_squares,
    relative_errors,
)


def random_shares(generator):
    """Return the shares of a made-up step."""
    if generator.random() < 0.5:
        return ((generator.randrange(2, 500), generator.randrange(500)),)
    return ((1, generator.randrange(500)),) * generator.choice((1, generator.randrange(2, 64)))


def test_fit_recovers_a_known_model():
    """Times that follow a cost model give back that model."""
    truth = CostModel(
        base_s=1e-3,
        prefill_token_s=5e-5,
        prefill_pair_s=7e-8,
        decode_seq_s=1e-4,
        decode_context_s=6e-7,
        matrix_s=3e-4,
    )
    generator = random.Random(1)
    shares = [random_shares(generator) for _ in range(40)]
    measurements = [Measurement(item, truth.step_s(item)) for item in shares]
    fitted = fit(measurements)
    for name in TERMS:
        assert getattr(fitted, name) == pytest.approx(getattr(truth, name), rel=1e-6)
    assert relative_errors(fitted, measurements).max() < 1e-9


def test_features_are_the_cost_models_terms():
    """Coefficients times features is what CostModel.step_s says, for mixed steps."""
    model = CostModel(
        base_s=1.0,
        prefill_token_s=2.0,
        prefill_pair_s=3.0,
        decode_seq_s=5.0,
        decode_context_s=7.0,
        matrix_s=11.0,
    )
    for shares in (((4, 10), (1, 3), (1, 0), (7, 0)), ((1, 5),), ((1, 5), (1, 2)), ((6, 0),)):
        product = np.dot([1.0, 2.0, 3.0, 5.0, 7.0, 11.0], step_terms(shares))
        assert product == pytest.approx(model.step_s(shares))
        if len(shares) == 1:
            assert product == pytest.approx(model.iteration_s(*shares[0]))


@pytest.mark.parametrize("seed", range(8))
def test_least_squares_are_optimal_and_non_negative(seed):
    """No coefficient is negative, and the optimality conditions hold."""
    generator = np.random.default_rng(seed)
    matrix = generator.normal(size=(20, 5)) * [1, 1e3, 1e6, 1, 1e-2]
    target = generator.normal(size=20)
    solution = non_negative_least_squares(matrix, target)
    assert (solution >= 0).all()
    gradient = matrix.T @ (matrix @ solution - target) / np.linalg.norm(matrix, axis=0)
    assert (gradient > -1e-8).all()
    assert np.abs(gradient[solution > 0]).max(initial=0.0) < 1e-8


def test_fit_of_nearly_nothing_is_a_valid_model():
    """One kind of step, and of prefill alone, still gives a positive shortest step."""
    assert fit([Measurement(((8, 0),), 0.01)]).min_iteration_s > 0.0
