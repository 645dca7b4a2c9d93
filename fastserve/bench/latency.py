"""From arrival and token times to the figures of a report.

Rules: plain arithmetic, no clock. JCT counts from the moment a request was due, not from the moment
the client got round to sending it, so that a client that falls behind cannot flatter the server.
Must not know: HTTP, policies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean


@dataclass(frozen=True, slots=True)
class Timing:
    """One answered request. Times are seconds of one clock."""

    arrived_at: float
    first_token_at: float
    last_token_at: float
    max_gap_s: float  # between two pieces of its text
    num_output_tokens: int

    @classmethod
    def of_pieces(
        cls, arrived_at: float, piece_times: Sequence[float], num_output_tokens: int
    ) -> Timing:
        """Return the times of an answer from those of its pieces."""
        longest = max((later - sooner for sooner, later in pairwise(piece_times)), default=0.0)
        return cls(arrived_at, piece_times[0], piece_times[-1], longest, num_output_tokens)

    @property
    def jct(self) -> float:
        """Job completion time: arrival to last token."""
        return self.last_token_at - self.arrived_at

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.first_token_at - self.arrived_at

    @property
    def normalized_latency(self) -> float:
        """Seconds per output token, the wait included (the paper's measure)."""
        return self.jct / self.num_output_tokens


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the percentile with linear interpolation between the two nearest ranks."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return mean, P50, P95, P99 and maximum."""
    return {
        "mean": fmean(values),
        "p50": percentile(values, 50),
        "p95": percentile(values, 95),
        "p99": percentile(values, 99),
        "max": max(values),
    }


def report(timings: Sequence[Timing]) -> dict[str, dict[str, float]]:
    """Return a summary for each measure."""
    return {
        "jct_s": summary([timing.jct for timing in timings]),
        "normalized_latency_s": summary([timing.normalized_latency for timing in timings]),
        "ttft_s": summary([timing.ttft for timing in timings]),
        "max_gap_s": summary([timing.max_gap_s for timing in timings]),
    }
