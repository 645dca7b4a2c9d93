"""What prometheus_client lacks: a histogram counted elsewhere, and metrics under several names.

Must not know: what is measured, the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class CountedHistogram(Collector):
    """A histogram whose values are put into buckets elsewhere."""

    def __init__(
        self, name: str, text: str, bounds: Sequence[float], labels: Mapping[str, str]
    ) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._bounds = (*(str(float(bound)) for bound in bounds), "+Inf")
        self._counts = [0.0] * len(self._bounds)
        self._sum = 0.0

    def inc(self, counts: Sequence[float], total: float) -> None:
        """Add values: how many in each bucket, and their sum."""
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)]
        self._sum += total

    def collect(self) -> Iterator[Metric]:
        """Yield the one metric."""
        family = HistogramMetricFamily(self._name, self._text, labels=tuple(self._labels))
        buckets, so_far = [], 0.0
        for bound, count in zip(self._bounds, self._counts, strict=True):
            so_far += count
            buckets.append((bound, so_far))
        family.add_metric(tuple(self._labels.values()), buckets, self._sum)
        yield family


class AliasedRegistry(Collector):
    """Collects registries with a prefix, and each metric once more under every alias it has.

    `aliases` maps the other name to the registries' own. A metric that several registries have is
    one, with the samples of all.
    """

    def __init__(
        self,
        registries: Sequence[CollectorRegistry],
        prefix: str,
        other: str,
        aliases: Mapping[str, str],
    ) -> None:
        self._registries = registries
        self._prefix = prefix
        self._others: dict[str, list[str]] = {}
        for alias, name in aliases.items():
            self._others.setdefault(name, []).append(other + alias)

    def collect(self) -> Iterator[Metric]:
        """Yield every metric under each of its names."""
        for metric in merged(self._registries):
            for name in (self._prefix + metric.name, *self._others.get(metric.name, ())):
                yield renamed(metric, name)


def merged(registries: Sequence[CollectorRegistry]) -> Iterable[Metric]:
    """Return the metrics of all registries, those of one name as one."""
    metrics: dict[str, Metric] = {}
    for registry in registries:
        for metric in registry.collect():
            if (first := metrics.setdefault(metric.name, metric)) is not metric:
                first.samples.extend(metric.samples)
    return metrics.values()


def renamed(metric: Metric, name: str) -> Metric:
    """Return a copy under another name, without the times of birth that no graph shows."""
    copy = Metric(name, metric.documentation, metric.type)
    copy.samples = [
        sample._replace(name=name + sample.name.removeprefix(metric.name))
        for sample in metric.samples
        if not sample.name.endswith("_created")
    ]
    return copy
