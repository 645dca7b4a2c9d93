"""Tally: what the ranks say of a step or a copy, until all whom it takes have said it.

Rules: any thread tells. A step takes every stage, a copy every rank; one that failed anywhere has
failed, and is over no sooner, for others may still write. Must not know: sockets, plans.
"""

from __future__ import annotations

import threading

from fastserve.core.messages import StepDone
from fastserve.executor.in_flight import InFlight
from fastserve.executor.layout import Layout


class Tally:
    """Tells an InFlight what is over on all ranks."""

    def __init__(self, layout: Layout, in_flight: InFlight) -> None:
        self._layout = layout
        self._in_flight = in_flight
        self._lock = threading.Lock()
        self._steps: dict[int, dict[int, StepDone]] = {}  # by the stages that are through
        self._copies: dict[int, list[bool]] = {}  # of the ranks where it is over

    def step_ended(self, rank: int, done: StepDone) -> None:
        """Note that the stage of a rank is through with a step.

        A request is billed its share of the machine: the stages' sum over the steps in flight.
        """
        num_stages = self._layout.pipeline_parallel_size
        with self._lock:
            stages = self._steps.setdefault(done.step_id, {})
            stages[self._layout.stage_of(rank)] = done
            if len(stages) < num_stages:
                return
            del self._steps[done.step_id]
        device_s = sum(stage.device_s for stage in stages.values()) / num_stages
        self._in_flight.finish(stages[num_stages - 1]._replace(device_s=device_s))

    def copy_ended(self, copy_id: int, is_done: bool) -> None:
        """Note that a copy is over on one more rank, and whether its blocks are there."""
        with self._lock:
            ranks = self._copies.setdefault(copy_id, [])
            ranks.append(is_done)
            if len(ranks) < self._layout.num_ranks:
                return
            del self._copies[copy_id]
        self._in_flight.finish_copy(copy_id, all(ranks))
