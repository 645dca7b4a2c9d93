"""From the times of requests to the figures that people compare: one arithmetic for every report.

Rules: every latency counts from arrival, so that a client or a queue that falls behind cannot
flatter the server; a percentile lies between the two nearest ranks, linearly. Times are seconds of
one clock, arrays of one row a request.
Must not know: how the times came about, policies, HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastserve.sim.workload import Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Times:
    """When requests arrived, began and ended to answer, and how much."""

    arrived_at: Floats
    first_token_at: Floats
    finished_at: Floats
    max_gap_s: Floats  # between two pieces of an answer
    output_tokens: npt.NDArray[np.int64]

    def latencies(self) -> dict[str, Floats]:
        """Return the figures of each request by their names in reports; NaN where there is none.

        JCT is arrival to last token. Normalized latency, the paper's, is JCT per output token. TPOT
        leaves out the first token.
        """
        jct = self.finished_at - self.arrived_at
        decode_s = self.finished_at - self.first_token_at
        output = self.output_tokens
        return {
            "jct_s": jct,
            "normalized_latency_s": jct / output,
            "ttft_s": self.first_token_at - self.arrived_at,
            "tpot_s": np.where(output > 1, decode_s / np.maximum(output - 1, 1), np.nan),
            "max_gap_s": self.max_gap_s,
        }


def percentile(values: Sequence[float] | Floats, percent: float) -> float:
    """Return the percentile; ValueError of no values."""
    if not len(values):
        raise ValueError("no values")
    return float(np.percentile(values, percent))


def summary(values: Sequence[float] | Floats) -> dict[str, float | None]:
    """Return mean, median, tail and maximum; NaN do not count, and nothing has no mean."""
    array = np.asarray(values, np.float64)
    known = array[~np.isnan(array)]
    if not len(known):
        return dict.fromkeys(("mean", "p50", "p95", "p99", "max"))
    p50, p95, p99 = np.percentile(known, (50, 95, 99)).tolist()
    return {"mean": float(known.mean()), "p50": p50, "p95": p95, "p99": p99,
            "max": float(known.max())}  # fmt: skip
