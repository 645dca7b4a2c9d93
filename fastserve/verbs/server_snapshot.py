"""What a server's metrics say at one moment, and how fast its totals grow between two.

Must not know: how it is shown, where the text of /metrics comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

PREFIX = "fastserve:"
NOT_OURS = "these are not the metrics of a FastServe server"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One look at a server; `totals` only grow, and `at` is when it was taken, in seconds.

    `started_at` is in Unix time, by the server's clock; None where it does not say.
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
    mean_work_s: float | None = None  # that requests found when they came


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
    gauges: dict[str, float] = {}
    totals: dict[str, float] = {}
    by_level: dict[int, int] = {}
    by_work: dict[str, int] = {}
    by_decile: dict[int, int] = {}
    blocks: dict[tuple[str, str], int] = {}
    model_name = ""
    for sample in samples:
        if not sample.name.startswith(PREFIX):
            continue
        name, labels, value = sample.name.removeprefix(PREFIX), sample.labels, sample.value
        if name == "requests_by_level":
            by_level[int(labels["level"])] = int(value)
        elif name == "requests_by_expected_work":
            by_work[labels["seconds"]] = int(value)
        elif name == "answers_by_predicted_decile_total":
            by_decile[int(labels["decile"])] = int(value)
        elif name == "kv_blocks":
            blocks[labels["tier"], labels["state"]] = int(value)
        elif name.endswith("_total"):
            totals[name] = totals.get(name, 0.0) + value
        else:
            gauges[name] = value
            model_name = labels.get("model_name", model_name)
    return Snapshot(
        at,
        model_name,
        gauges.get("start_time_seconds"),
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
    )


def rate(before: Snapshot | None, now: Snapshot, name: str) -> float | None:
    """Return how fast a total grows, a second; None if that cannot be told yet."""
    if before is None or name not in before.totals or now.at <= before.at:
        return None
    return (now.totals[name] - before.totals[name]) / (now.at - before.at)
