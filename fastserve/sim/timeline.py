"""Watches a run: queue lengths and KV over time for a plot, every step for a trace viewer.

Rules: a timeline's size is bounded whatever the length of the run; trace events go to a file as
they happen. Must not know: how either is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from fastserve.core.messages import (
    Copy,
    CopyDirection,
    ExecutorOutput,
    Fact,
    RequestUpdate,
    SchedulerOutput,
)
from fastserve.core.scheduler import Scheduler

MAX_SAMPLES = 2048
COPY_ROWS = {CopyDirection.SWAP_OUT: 1000, CopyDirection.SWAP_IN: 1001}  # beyond all stages


class TimelineSample(NamedTuple):
    """Requests and KV blocks at one moment."""

    at: float
    num_waiting: int
    num_running: int
    num_preempted: int
    num_device_blocks: int
    num_host_blocks: int
    num_live: int


class Timeline:
    """Looks at the scheduler at even distances; when there are too many samples, half of them go
    and the distance doubles.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.samples: list[TimelineSample] = []
        self._scheduler = scheduler
        self._interval_s = 0.01
        self._next_at = 0.0

    def told(self, fact: Fact, now: float) -> None:
        """A fact changes nothing that a look after the step would not show."""

    def planned(self, plan: SchedulerOutput | None, can_compute: bool, now: float) -> None:
        """Nor does a plan."""

    def updated(self, output: ExecutorOutput, updates: Sequence[RequestUpdate], now: float) -> None:
        """Look, if it is time."""
        if now < self._next_at:
            return
        stats, cache = self._scheduler.stats(), self._scheduler.cache
        self.samples.append(
            TimelineSample(
                now,
                stats.num_waiting,
                stats.num_running,
                stats.num_preempted,
                stats.device_blocks_used,
                stats.host_blocks_used,
                cache.num_tables,
            )
        )
        if len(self.samples) >= MAX_SAMPLES:
            del self.samples[1::2]
            self._interval_s *= 2
        self._next_at = now + self._interval_s


class TraceEvents:
    """Writes Chrome's trace event format: steps by pipeline stage, copies, and counters.

    Perfetto and chrome://tracing open it. Times are virtual microseconds.
    """

    def __init__(self, file: TextIO, policy: str) -> None:
        self.scheduler: Scheduler | None = None  # whose requests and blocks are counted
        self._file = file
        self._counters: dict[str, int] = {}
        name = {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": policy}}
        file.write("[\n" + json.dumps(name))

    def see(self, plan: SchedulerOutput, stages: Sequence[tuple[float, float]]) -> None:
        """Write one step."""
        num_decodes = sum(work.num_tokens == 1 for work in plan.work)
        shown = {
            "sequences": len(plan.work),
            "tokens": plan.num_tokens,
            "decodes": num_decodes,
            "first requests": [work.handle for work in plan.work[:8]],
        }
        kind = "decode" if num_decodes == len(plan.work) else "prefill"
        for stage, (begins_at, ends_at) in enumerate(stages):
            self._write(
                "X", f"{kind} {plan.num_tokens}", begins_at, shown,
                tid=stage, dur=round((ends_at - begins_at) * 1e6, 3), id=plan.step_id,
            )  # fmt: skip
        if self.scheduler is not None:
            cache = self.scheduler.cache
            self._count("requests in the system", self.scheduler.num_requests, stages[0][0])
            self._count("requests with KV", cache.num_tables, stages[0][0])
            self._count("KV blocks", cache.pool.device.num_used, stages[0][0])

    def see_copy(self, copy: Copy, begins_at: float, ends_at: float) -> None:
        """Write one copy: those of a direction have a row."""
        num_blocks = len(copy.src)
        self._write(
            "X", f"swap {copy.direction} {num_blocks}", begins_at, {"blocks": num_blocks},
            tid=COPY_ROWS[copy.direction], dur=round((ends_at - begins_at) * 1e6, 3),
            id=copy.copy_id,
        )  # fmt: skip

    def _count(self, name: str, value: int, at: float) -> None:
        """Write a counter where it changes."""
        if self._counters.get(name) != value:
            self._counters[name] = value
            self._write("C", name, at, {"": value})

    def _write(self, phase: str, name: str, at: float, args: object, **more: object) -> None:
        event = {"ph": phase, "pid": 1, "name": name, "ts": round(at * 1e6, 3), "args": args}
        self._file.write(",\n" + json.dumps(event | more, separators=(",", ":")))

    def close(self) -> None:
        """End the list; the file is the caller's."""
        self._file.write("\n]\n")
