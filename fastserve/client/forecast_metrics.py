"""Metrics of predictions: how answers compare with what was expected of them, and work ahead.

Rules: they are there only where the engine's policy predicts, so that no graph shows a zero that
means nothing. Work is in seconds of the machine. Must not know: how lengths are predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge

from fastserve.core.messages import WORK_BOUNDS_S, Forecasts

WORK_RANGES = tuple(
    f"{low:g}-{high:g}" if high else f"{low:g}+"
    for low, high in zip((0.0, *WORK_BOUNDS_S), (*WORK_BOUNDS_S, None), strict=True)
)
"""Labels of the buckets of work, in seconds: from, and below."""


class ForecastMetrics:
    """What is exported of a policy that predicts."""

    def __init__(self, registry: CollectorRegistry, names: Mapping[str, str]) -> None:
        """`names` are labels that every sample has."""
        self._names = names

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, (*names, *labels), registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, (*names, *labels), registry=registry)

        self._by_decile = counter(
            "answers_by_predicted_decile",
            "Ended answers by the tenth of their predicted distribution that their length fell "
            "into; where predictions are right all are alike.",
            "decile",
        )
        self._predicted = counter(
            "predicted_output_tokens",
            "Tokens expected at arrival of the answers that have ended since.",
        ).labels(**names)
        self._answered = counter(
            "answered_tokens", "Tokens that these answers came to, aborted ones too."
        ).labels(**names)
        self._work = gauge(
            "expected_work_seconds", "Machine time that all requests are expected to take still."
        ).labels(**names)
        self._mean_work = gauge(
            "mean_expected_work_seconds",
            "The same, as arrivals find it: mean over the latest of them.",
        ).labels(**names)
        self._by_work = gauge(
            "requests_by_expected_work",
            "Requests by the seconds of machine time expected of each still.",
            "seconds",
        )

    def snapshot(
        self,
        forecasts: Forecasts,
        requests_by_work: Sequence[int],
        gained: Callable[[str, float], float],
    ) -> None:
        """Take over the engine's figures; `gained` tells by how much one of its counts grew."""
        names = self._names
        for decile, count in enumerate(forecasts.num_by_decile):
            gain = gained(f"decile_{decile}", count)
            self._by_decile.labels(**names, decile=str(decile)).inc(gain)
        self._predicted.inc(gained("predicted_tokens", forecasts.predicted_tokens))
        self._answered.inc(gained("answered_tokens", forecasts.answered_tokens))
        self._work.set(forecasts.work_s)
        self._mean_work.set(forecasts.mean_work_s)
        for seconds, count in zip(WORK_RANGES, requests_by_work, strict=True):
            self._by_work.labels(**names, seconds=seconds).set(count)
