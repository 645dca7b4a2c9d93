"""Shows observers what the engine of another process did, by the journal that it wrote.

Rules: an observer sees what it would have seen in the engine's loop, at the same times, but for
what no journal holds: of a plan it is told the step and the shares, of a result no news.
Must not know: who observes, why.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastserve.core.cost_model import CostModel
from fastserve.core.journal import read_fact
from fastserve.core.messages import ExecutorOutput, SchedulerOutput, Work
from fastserve.engine.interfaces import Observer
from fastserve.settings.scheduler import SchedulerConfig


class Journalled(NamedTuple):
    """What an engine was built from, and how many requests it was given."""

    config: SchedulerConfig
    cost_model: CostModel
    num_device_blocks: int
    num_requests: int


def observe(path: Path, observers: Iterable[Observer]) -> Journalled:
    """Let observers see one run, from its first line to its last."""
    num_requests = 0
    with path.open(encoding="utf-8") as lines:
        _, _, _, settings, costs, num_device_blocks, *_ = json.loads(next(lines))
        for line in lines:
            kind, at, *fields = json.loads(line)
            now = float.fromhex(at)
            if kind == "schedule":
                can_compute, plan = fields
                for observer in observers:
                    observer.planned(_read_plan(plan), can_compute, now)
                continue
            num_requests += kind == "add"
            fact = read_fact(kind, fields)
            for observer in observers:
                observer.told(fact, now)
                if isinstance(fact, ExecutorOutput):
                    observer.updated(fact, (), now)
    settings["eos_token_ids"] = frozenset(settings["eos_token_ids"])
    return Journalled(
        SchedulerConfig(**settings), CostModel(**costs), num_device_blocks, num_requests
    )


def _read_plan(fields: Sequence[Any] | None) -> SchedulerOutput | None:
    if fields is None:
        return None
    step_id, _, work, *_ = fields
    return SchedulerOutput(step_id, (), tuple(Work(*each) for each in work))
