"""Metrics of KV that moves between the device and the host.

Rules: they are there only where there is a host tier, so that no graph shows a zero that means
nothing. The engine counts blocks; what is exported is bytes and seconds. Must not know: what moves
KV, or when.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter

from fastserve.core.messages import SchedulerStats


class Moved(NamedTuple):
    """Blocks that the engine counts: the metric of their bytes, why they moved, their field."""

    name: str
    reason: str
    field: str


MOVED = (
    Moved("swap_out_bytes", "demand", "num_swapped_out_blocks"),
    Moved("swap_out_bytes", "ahead", "num_saved_blocks"),
    Moved("swap_in_bytes", "demand", "num_swapped_in_blocks"),
    Moved("swap_in_bytes", "ahead", "num_fetched_blocks"),
)
TEXTS = {
    "swap_out_bytes": "KV copied to the host: to make room (demand), or before any was wanted.",
    "swap_in_bytes": "KV copied to the device: for a request that was to run (demand), or before.",
}


class SwapMetrics:
    """What is exported of a host tier; a block has `block_bytes`."""

    def __init__(
        self, registry: CollectorRegistry, names: Mapping[str, str], block_bytes: int
    ) -> None:
        """`names` are labels that every sample has."""
        self._block_bytes = block_bytes

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, (*names, *labels), registry=registry)

        by_name = {name: counter(name, text, "reason") for name, text in TEXTS.items()}
        self._moved = {
            moved.field: by_name[moved.name].labels(**names, reason=moved.reason) for moved in MOVED
        }
        self._clean = counter(
            "swap_clean_bytes", "KV taken from the device without a copy: the host had it."
        ).labels(**names)
        self._swaps = counter(
            "swaps", "Times that KV of a request came back from the host."
        ).labels(**names)
        self._failed = counter(
            "failed_copies", "Copies of KV that failed; it is computed again where it was needed."
        ).labels(**names)
        self._wait_s = counter(
            "copy_wait_seconds", "Seconds in which nothing could run but for a copy."
        ).labels(**names)

    def snapshot(self, now: SchedulerStats, gained: Callable[[str, float], float]) -> None:
        """Take over the engine's figures; `gained` tells by how much one of its counts grew."""
        for field, counter in self._moved.items():
            counter.inc(gained(field, getattr(now, field)) * self._block_bytes)
        self._clean.inc(gained("clean_blocks", now.num_clean_blocks) * self._block_bytes)
        self._swaps.inc(gained("swaps", now.num_swaps))
        self._failed.inc(gained("failed_copies", now.num_failed_copies))
        self._wait_s.inc(gained("copy_wait_s", now.copy_wait_s))
