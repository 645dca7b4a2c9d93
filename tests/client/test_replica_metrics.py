"""The metrics of several engines as one exposition."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from fastserve.client.metrics import EngineMetrics
from fastserve.client.replica_metrics import ReplicaMetrics
from tests.client.test_metrics import snapshot
from tests.wire.test_engine_messages import INFO


def test_each_name_is_one_family_with_the_samples_of_all() -> None:
    """As Prometheus wants it: told apart by the label that vLLM's dashboards sum over."""
    engines = [EngineMetrics("demo", replica) for replica in range(2)]
    metrics = ReplicaMetrics("demo", engines, lambda: 1)
    for replica, engine in enumerate(engines):
        engine.loaded(INFO)
        engine.snapshot(snapshot(num_running=3 + replica))
    engines[1].generated(7)
    metrics.asked(2)
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    families = list(text_string_to_metric_families(body.decode()))
    names = [family.name for family in families]
    assert len(set(names)) == len(names)
    samples = {
        (sample.name, sample.labels.get("engine")): sample.value
        for family in families
        for sample in family.samples
    }
    for prefix in ("vllm:", "fastserve:"):
        running = [samples[f"{prefix}num_requests_running", str(n)] for n in range(2)]
        assert running == [3, 4]
        generated = [samples[f"{prefix}generation_tokens_total", str(n)] for n in range(2)]
        assert generated == [0, 7]
    assert samples["fastserve:replicas", None] == 2
    assert samples["fastserve:replicas_serving", None] == 1
    assert samples["fastserve:request_params_n_sum", "0"] == 2


def test_of_one_engine_nothing_is_named_anew() -> None:
    """All it exports is there as it would be by itself, under the same labels."""
    engine = EngineMetrics("demo")
    engine.loaded(INFO)
    alone = set(engine.render()[0].decode().splitlines())
    served = set(ReplicaMetrics("demo", [engine], lambda: 1).render()[0].decode().splitlines())
    assert alone < served
    assert all("fastserve:replicas" in line for line in served - alone)
