"""What a soak has found: how memory grew, and what became of the clients. Must not know: how."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.footprint import Footprint

MIB = 2**20
ROWS_OF_A_REPORT = 16


class Sample(NamedTuple):
    """One look at a server under load."""

    at_s: float
    load: float  # share of the seats that ran a request since the last one, on average
    rate: float  # clients a second since then
    num_in_flight: int
    api: Footprint
    engine: Footprint


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the straight line that fits points best; 0 for fewer than two."""
    if len(points) < 2:
        return 0.0
    mean_x, mean_y = fmean(x for x, _ in points), fmean(y for _, y in points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def memory(samples: Sequence[Sample], warm_up_s: float) -> dict[str, Any]:
    """Return how the memory of both processes grew once they were warm.

    Warm, and at the end, are means of a tenth of the samples.
    """
    warm = [sample for sample in samples if sample.at_s >= warm_up_s]
    told: dict[str, Any] = {}
    for name in ("api", "engine"):
        rss = [(sample.at_s, getattr(sample, name).rss_bytes / MIB) for sample in warm]
        tenth = max(1, len(rss) // 10)
        sizes = [size for _, size in rss]
        told[name] = {
            "rss_mib_at_start": round(getattr(samples[0], name).rss_bytes / MIB, 1),
            "rss_mib_warm": round(fmean(sizes[:tenth]), 1),
            "rss_mib_at_end": round(fmean(sizes[-tenth:]), 1),
            "rss_mib_max": round(max(sizes), 1),
            "slope_mib_per_hour": round(3600 * slope(rss), 2),
        }
    return told


def course(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return a few looks at the whole run, evenly spread."""
    step = max(1, len(samples) // ROWS_OF_A_REPORT)
    return [
        {
            "minute": round(sample.at_s / 60, 1),
            "load": round(sample.load, 2),
            "clients_per_s": round(sample.rate, 1),
            "in_flight": sample.num_in_flight,
            "api_rss_mib": round(sample.api.rss_bytes / MIB, 1),
            "engine_rss_mib": round(sample.engine.rss_bytes / MIB, 1),
            "fds": sample.api.num_fds,
            "threads": [sample.api.num_threads, sample.engine.num_threads],
        }
        for sample in samples[::step]
    ]
