"""Tells a fresh scheduler what a journal tells, without an engine."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence

from fastserve.core.build import build_scheduler
from fastserve.core.cost_model import CostModel
from fastserve.core.journal import Journal, read_fact
from fastserve.core.lengths import LengthModel
from fastserve.core.messages import Aborted, ExecutorOutput, Finished
from fastserve.core.request import Arrival
from fastserve.settings.scheduler import SchedulerConfig
from tests.core.harness import UNIT_COST


def replayed(
    lines: Sequence[str],
    config: SchedulerConfig,
    num_device_blocks: int,
    length_model: LengthModel | None = None,
    *,
    num_host_blocks: int = 0,
    costs: CostModel = UNIT_COST,
) -> list[str]:
    """Return the lines that a new scheduler gives rise to, told the facts of some lines."""
    written: list[str] = []
    journal = Journal(written.append)
    scheduler = build_scheduler(
        config, costs, num_device_blocks, num_host_blocks, length_model=length_model
    )
    for line in lines:
        kind, at, *fields = json.loads(line)
        now = float.fromhex(at)
        if kind == "schedule":
            journal.planned(scheduler.schedule(now, fields[0]), fields[0], now)
            continue
        fact = read_fact(kind, fields)
        journal.told(fact, now)
        match fact:
            case Arrival():
                with contextlib.suppress(ValueError):
                    scheduler.add(fact, now)
            case Aborted(handle):
                scheduler.abort(handle, now)
            case Finished(handle, num_output_tokens):
                scheduler.finish(handle, num_output_tokens, now)
            case ExecutorOutput():
                scheduler.update(fact, now)
    assert scheduler.num_requests == 0
    scheduler.check()
    return written
