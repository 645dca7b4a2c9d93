"""Puts DistServe's whole-model fits in CostModel's terms.

DistServe has a base of its own for prefill and for decodes of small and of large batches;
CostModel has one base and a floor. The coefficients are those that come nearest over the steps
that a server makes.
Must not know: rooflines, other tables.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastserve.core.cost_model import TERMS, CostModel, step_terms
from fastserve.executor.fitting import non_negative_least_squares

Floats = npt.NDArray[np.float64]


def fit_rows(features: Floats, seconds: Floats, weights: Floats | None = None) -> Floats:
    """Return the non-negative coefficients of least squared relative error."""
    scale = seconds if weights is None else seconds / weights
    return non_negative_least_squares(features / scale[:, None], seconds / scale)


def distserve_steps(fit: dict[str, Any]) -> list[tuple[tuple[tuple[int, int], ...], float]]:
    """Return steps across the range that one of DistServe's fits covers, with its seconds."""
    start, per_token, per_square = fit["prefill"]
    steps = []
    for length in (64, 128, 256, 512, 768, 1024, 1536, 2048):
        for batch in (1, 2, 4):
            if length * batch <= 4096:
                time_ms = start + batch * (per_token * length + per_square * length**2)
                steps.append((((length, 0),) * batch, time_ms / 1e3))
    for batch in (1, 2, 4, 8, 16, 32, 48, 64, 94, 128, 192, 256):
        is_small = batch < fit["decoding_large_small_bs_threshold"]
        start, per_context, per_seq = fit["decoding_smallbs" if is_small else "decoding_largebs"]
        for context in (64, 128, 256, 512, 1024, 2000):
            if batch * context <= 64_000:
                time_ms = start + per_context * batch * context + per_seq * batch
                steps.append((((1, context - 1),) * batch, time_ms / 1e3))
    return steps


def fit_direct(fit: dict[str, Any]) -> dict[str, float]:
    """Put one of DistServe's fits, which has three bases and two slopes, in CostModel's terms."""
    steps = distserve_steps(fit)
    # Its formulas make no difference between one row and several: no term for that (the last).
    features = np.array([step_terms(shares)[:-1] for shares, _ in steps])
    seconds = np.array([step_s for _, step_s in steps])
    candidates = []
    for floor_s in np.linspace(0.0, 0.9 * seconds.min(), 41):
        is_flat = np.zeros(len(steps), bool)
        for _ in range(20):
            adjusted = features.copy()
            adjusted[:, [1, 3]] *= ~is_flat[:, None]
            found = fit_rows(adjusted, seconds - floor_s * is_flat)
            is_flat = features[:, 1] * found[1] + features[:, 3] * found[3] < floor_s
        coefficients = dict(zip(tuple(TERMS)[:-1], found.tolist(), strict=True))
        cost_model = CostModel(**coefficients, floor_s=float(floor_s))
        predicted = np.array([cost_model.step_s(shares) for shares, _ in steps])
        error = float(np.mean((predicted / seconds - 1.0) ** 2))
        candidates.append((error, {**coefficients, "floor_s": float(floor_s)}))
    return min(candidates, key=lambda candidate: candidate[0])[1]
