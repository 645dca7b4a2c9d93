"""Fits a CostModel to measured steps.

Rules: non-negative least squares of the RELATIVE error, so that short steps count as much as long
ones, and no work is ever predicted to save time. Must not know: how steps were measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastserve.core.cost_model import TERMS, CostModel, step_terms

Shares = tuple[tuple[int, int], ...]
"""A kind of step: (num_tokens, start) of each request in it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Measurement:
    """Median seconds of one kind of step."""

    shares: Shares
    seconds: float


def fit(measurements: Sequence[Measurement]) -> CostModel:
    """Return the non-negative coefficients of least squared relative error."""
    seconds = np.array([item.seconds for item in measurements])
    features = np.array([step_terms(item.shares) for item in measurements])
    coefficients = non_negative_least_squares(features / seconds[:, None], np.ones(len(seconds)))
    if coefficients[0] + coefficients[3] + coefficients[4] <= 0.0:
        coefficients[0] = seconds.min()  # too few kinds of step to tell the terms apart
    return CostModel(**dict(zip(TERMS, coefficients.tolist(), strict=True)))


def relative_errors(
    cost_model: CostModel, measurements: Sequence[Measurement]
) -> npt.NDArray[np.float64]:
    """Return |predicted - measured| / measured of each kind of step."""
    predicted = np.array([cost_model.step_s(item.shares) for item in measurements])
    seconds = np.array([item.seconds for item in measurements])
    errors: npt.NDArray[np.float64] = np.abs(predicted - seconds) / seconds
    return errors


def non_negative_least_squares(
    matrix: npt.NDArray[np.float64], target: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Minimize |matrix x - target| over x ≥ 0, by the active-set method of Lawson and Hanson."""
    scale = np.maximum(np.linalg.norm(matrix, axis=0), 1e-300)
    scaled = matrix / scale
    solution = np.zeros(matrix.shape[1])
    is_free = np.zeros(matrix.shape[1], bool)
    for _ in range(3 * matrix.shape[1]):
        gradient = np.where(is_free, -np.inf, scaled.T @ (target - scaled @ solution))
        if gradient.max() <= 1e-12:
            break
        is_free[int(np.argmax(gradient))] = True
        while True:
            trial = np.zeros_like(solution)
            trial[is_free] = np.linalg.lstsq(scaled[:, is_free], target, rcond=None)[0]
            if trial[is_free].min() > 0.0:
                break
            blocked = is_free & (trial <= 0.0)
            steps = solution[blocked] / (solution[blocked] - trial[blocked])
            solution += float(steps.min()) * (trial - solution)
            is_free &= solution > 1e-15
            if not is_free.any():
                return np.zeros_like(solution)
        solution = trial
    unscaled: npt.NDArray[np.float64] = solution / scale
    return unscaled
