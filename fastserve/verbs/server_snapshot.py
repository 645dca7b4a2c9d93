"""What a server's metrics say at one moment, and how fast its totals grow between two.

Must not know: how it is shown, where the text of /metrics comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

Key = TypeVar("Key")
Number = TypeVar("Number", int, float)

PREFIX = "fastserve:"
NOT_OURS = "these are not the metrics of a FastServe server"


@dataclass(slots=True)
class ReplicaSnapshot:
    """What one of several engines does."""

    running: int = 0
    waiting: int = 0
    kv_share: float = 0.0  # of its blocks that requests hold
    generated: float = 0.0  # output tokens in all
    restarts: int = 0
    is_loaded: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One look at a server; `totals` only grow, and `at` is when it was taken, in seconds.

    `started_at` is in Unix time, by the server's clock; None where it does not say. Figures are
    sums over all replicas; `replicas` has those of each apart.
    """

    at: float
    model_name: str = ""
    started_at: float | None = None
    is_loaded: bool = True
    running: int = 0
    waiting: int = 0
    by_level: Mapping[int, int] = field(default_factory=dict)
    by_work: Mapping[str, int] = field(default_factory=dict)  # by seconds expected, in order
    by_decile: Mapping[int, int] = field(default_factory=dict)  # answers, of what was predicted
    blocks: Mapping[tuple[str, str], int] = field(default_factory=dict)  # by (tier, state)
    totals: Mapping[str, float] = field(default_factory=dict)
    work_s: float | None = None  # of the machine, expected in all; None: nothing is predicted
    mean_work_s: float | None = None  # that requests found when they came, in all replicas
    replicas: Mapping[int, ReplicaSnapshot] = field(default_factory=dict)
    num_serving: int | None = None  # of them, as the server counts


def read_snapshot(exposition: str, at: float) -> Snapshot:
    """Take a snapshot out of the text of /metrics.

    Raises ValueError if this is not the text of a FastServe server.
    """
    try:
        families = list(text_string_to_metric_families(exposition))
        return _read([sample for family in families for sample in family.samples], at)
    except (ValueError, KeyError) as error:
        raise ValueError(NOT_OURS) from error


def _read(samples: Sequence[Sample], at: float) -> Snapshot:
    """Sort the samples; KeyError or ValueError for those of another server."""
    gauges: dict[str, float] = {}  # sums over the replicas
    replicas: dict[int, ReplicaSnapshot] = {}
    totals: dict[str, float] = {}
    by_level: dict[int, int] = {}
    by_work: dict[str, int] = {}
    by_decile: dict[int, int] = {}
    blocks: dict[tuple[str, str], int] = {}
    model_name, started_at = "", None
    for sample in samples:
        if not sample.name.startswith(PREFIX):
            continue
        name, labels, value = sample.name.removeprefix(PREFIX), sample.labels, sample.value
        if "engine" in labels:
            replica = replicas.setdefault(int(labels["engine"]), ReplicaSnapshot())
            _note(replica, name, value)
        if name == "requests_by_level":
            _add(by_level, int(labels["level"]), int(value))
        elif name == "requests_by_expected_work":
            _add(by_work, labels["seconds"], int(value))
        elif name == "answers_by_predicted_decile_total":
            _add(by_decile, int(labels["decile"]), int(value))
        elif name == "kv_blocks":
            _add(blocks, (labels["tier"], labels["state"]), int(value))
        elif name == "start_time_seconds":
            started_at = value
        elif name.endswith("_total"):
            _add(totals, name, value)
        else:
            _add(gauges, name, value)
            model_name = labels.get("model_name", model_name)
    return Snapshot(
        at,
        model_name,
        started_at,
        "cache_config_info" in gauges,
        int(gauges["num_requests_running"]),
        int(gauges["num_requests_waiting"]),
        by_level,
        by_work,
        by_decile,
        blocks,
        totals,
        gauges.get("expected_work_seconds"),
        gauges.get("mean_expected_work_seconds"),
        replicas,
        int(gauges["replicas_serving"]) if "replicas_serving" in gauges else None,
    )


def _add(sums: dict[Key, Number], key: Key, value: Number) -> None:
    sums[key] = sums[key] + value if key in sums else value


def _note(replica: ReplicaSnapshot, name: str, value: float) -> None:
    """Take over a figure of an engine, if it is one that is shown of each."""
    if name == "num_requests_running":
        replica.running = int(value)
    elif name == "num_requests_waiting":
        replica.waiting = int(value)
    elif name == "kv_cache_usage_perc":
        replica.kv_share = value
    elif name == "generation_tokens_total":
        replica.generated = value
    elif name == "engine_restarts_total":
        replica.restarts = int(value)
    elif name == "cache_config_info":
        replica.is_loaded = True


def rate(before: Snapshot | None, now: Snapshot, name: str) -> float | None:
    """Return how fast a total grows, a second; None if that cannot be told yet."""
    if before is None or name not in before.totals or now.at <= before.at:
        return None
    return (now.totals[name] - before.totals[name]) / (now.at - before.at)
