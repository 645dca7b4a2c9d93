"""One simulation as a value, and several of them side by side in processes of their own.

Rules: a job is resolved before it starts, so that what is wrong with it is known early; whatever it
writes beside its result, it writes itself. Must not know: terminals.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from fastserve.core.journal import Journal, plain
from fastserve.core.scheduler import Scheduler
from fastserve.engine.interfaces import Observer
from fastserve.settings.scheduler import SchedulerConfig
from fastserve.sim.replicas import simulate_replicas
from fastserve.sim.report import make_report
from fastserve.sim.simulator import Machine, Outcome, simulate
from fastserve.sim.timeline import Timeline, TimelineSample, TraceEvents
from fastserve.sim.workload import Workload

PROGRESS_INTERVAL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A workload under one policy. `settings` are for the report: how it was asked for.

    Of several replicas each writes a journal of its own; timeline and trace events are of one.
    """

    config: SchedulerConfig
    machine: Machine
    workload: Workload
    num_replicas: int = 1
    is_closed_loop: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    has_timeline: bool = False
    journal: Path | None = None
    trace_events: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JobResult:
    """A report, and what it was made from."""

    report: dict[str, Any]
    outcome: Outcome
    timeline: list[TimelineSample]


def run_job(job: Job, on_progress: Callable[[int], None] = lambda num_ended: None) -> JobResult:
    """Run one job here; `on_progress` is told how many requests have ended."""
    begun = time.perf_counter()
    timelines: list[Timeline] = []
    journals: list[Journal] = []
    with contextlib.ExitStack() as opened:
        events = _open_trace_events(job, opened)

        def observers(scheduler: Scheduler) -> Sequence[Observer]:
            journals.append(_open_journal(job, opened, len(journals)))
            if events is not None:
                events.scheduler = scheduler
            if job.has_timeline:
                timelines.append(Timeline(scheduler))
            return [journals[-1], *timelines]

        if job.num_replicas > 1:
            outcome = simulate_replicas(
                job.config,
                job.machine,
                job.workload,
                job.num_replicas,
                is_closed_loop=job.is_closed_loop,
                observers=observers,
                on_progress=on_progress,
            )
        else:
            outcome = simulate(
                job.config,
                job.machine,
                job.workload,
                is_closed_loop=job.is_closed_loop,
                observers=observers,
                on_step=None if events is None else events.see,
                on_copy=None if events is None else events.see_copy,
                on_progress=on_progress,
            )
    report = make_report(
        outcome,
        job.workload,
        job.config,
        job.machine,
        settings=job.settings,
        wall_s=time.perf_counter() - begun,
        journal_sha256=_sha256_of([journal.sha256 for journal in journals]),
    )
    samples = [sample for timeline in timelines for sample in timeline.samples]
    return JobResult(report=report, outcome=outcome, timeline=samples)


def _sha256_of(digests: Sequence[str]) -> str:
    """Return the digest of a journal, or that of the digests of several."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _open_journal(job: Job, opened: contextlib.ExitStack, replica: int) -> Journal:
    sink = None
    if job.journal is not None:
        path = job.journal
        if job.num_replicas > 1:
            path = path.with_name(f"{path.name}.{replica}")
        sink = opened.enter_context(path.open("w", encoding="utf-8")).write
    # The same lines as the core's own writer, ten times as fast.
    journal = Journal(sink, msgspec.json.Encoder(enc_hook=plain).encode)
    machine = job.machine
    journal.open(
        0.0,
        job.config,
        machine.cost_model,
        machine.num_device_blocks,
        machine.num_host_blocks,
    )
    return journal


def _open_trace_events(job: Job, opened: contextlib.ExitStack) -> TraceEvents | None:
    if job.trace_events is None:
        return None
    file = opened.enter_context(job.trace_events.open("w", encoding="utf-8"))
    events = TraceEvents(file, job.config.scheduling_policy)
    opened.callback(events.close)
    return events


class AbandonedError(Exception):
    """The result is not waited for any more."""


_progress: Any = None  # of this process, when it is one of several


def _start_worker(progress: Any) -> None:
    global _progress
    _progress = progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer


def _run_in_worker(index: int, job: Job) -> JobResult:
    def report(num_ended: int) -> None:
        if _progress[-1]:
            raise AbandonedError
        _progress[index] = num_ended

    return run_job(job, report)


def run_side_by_side(
    jobs: Sequence[Job], num_processes: int, on_progress: Callable[[int, int], None]
) -> list[JobResult]:
    """Run several jobs in processes; `on_progress` gets (index of the job, requests ended).

    When one fails the others are given up.
    """
    context = multiprocessing.get_context("spawn")
    progress = context.RawArray("q", len(jobs) + 1)  # the last one: whether to give up
    with ProcessPoolExecutor(
        min(num_processes, len(jobs)), context, _start_worker, (progress,)
    ) as pool:
        running = [pool.submit(_run_in_worker, index, job) for index, job in enumerate(jobs)]
        try:
            left = set(running)
            while left:
                ended, left = wait(left, PROGRESS_INTERVAL_S)
                for future in ended:
                    future.result()
                for index, num_ended in enumerate(progress[:-1]):
                    on_progress(index, num_ended)
        except BaseException:
            progress[-1] = 1
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in running]
