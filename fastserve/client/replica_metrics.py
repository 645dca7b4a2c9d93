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
        self._model_name = model_name
        self._registry = CollectorRegistry(auto_describe=False)
        text = "Engines behind this server, those that do not serve too."
        self.show("replicas", text, lambda: len(self._engines))
        self.show("replicas_serving", "Engines that run requests at this moment.", num_serving)

    def show(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Let a gauge of that name show a value of the server's own from now on."""
        gauge = Gauge(name, text, ("model_name",), registry=self._registry)
        gauge.labels(model_name=self._model_name).set_function(value)

    def asked(self, n: int) -> None:
        """See a prompt that `n` choices are wanted of: counted with the first engine, once."""
        self._engines[0].asked(n)

    def render(self) -> tuple[bytes, str]:
        """Return the exposition and its content type."""
        return render([*(engine.registry for engine in self._engines), self._registry])
