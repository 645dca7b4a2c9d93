"""The metrics of a server: those of every replica of its engine as one exposition.

Rules: each sample of an engine bears its number as the label `engine`, which dashboards sum over;
what belongs to no engine alone is said once. Must not know: what is counted, how replicas are run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Gauge

from fastserve.client.metrics import EngineMetrics, render


class ReplicaMetrics:
    """Fits `ServerMetrics`; `num_serving` tells how many replicas run requests at this moment."""

    def __init__(
        self, model_name: str, engines: Sequence[EngineMetrics], num_serving: Callable[[], int]
    ) -> None:
        self._engines = tuple(engines)
        self._registry = CollectorRegistry(auto_describe=False)
        for name, text, value in (
            ("replicas", "Engines behind this server, those that do not serve too.", self._count),
            ("replicas_serving", "Engines that run requests at this moment.", num_serving),
        ):
            gauge = Gauge(name, text, ("model_name",), registry=self._registry)
            gauge.labels(model_name=model_name).set_function(value)

    def _count(self) -> int:
        return len(self._engines)

    def asked(self, n: int) -> None:
        """See a prompt that `n` choices are wanted of: counted with the first engine, once."""
        self._engines[0].asked(n)

    def render(self) -> tuple[bytes, str]:
        """Return the exposition and its content type."""
        return render([*(engine.registry for engine in self._engines), self._registry])
