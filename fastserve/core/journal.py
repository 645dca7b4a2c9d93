"""The journal: one line per fact and per plan, exact, so that a run can be told apart and replayed.

Rules: times are written as `float.hex()`, so nothing is rounded; lines are JSON arrays
`[kind, now, …]`. Same facts, same plans, same hash, in any process. Must not know: files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastserve.core.cost_model import CostModel
from fastserve.core.messages import ExecutorOutput, RequestUpdate, SchedulerOutput, StepDone
from fastserve.core.request import Arrival, SamplingParams
from fastserve.core.scheduler import Scheduler
from fastserve.settings.scheduler import SchedulerConfig


def plain(value: Any) -> Any:
    """Return what JSON has a word for in place of what it has none for."""
    if isinstance(value, range):
        return {"range": [value.start, value.stop]}
    if isinstance(value, SamplingParams):
        return {name: getattr(value, name) for name in SamplingParams.__slots__}
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(f"cannot write {type(value).__name__} into a journal")


def encode_line(values: Sequence[Any]) -> bytes:
    """Return one line as JSON."""
    return json.dumps(values, default=plain, separators=(",", ":")).encode()


class Journal:
    """A running sha256 over lines, which also go to `sink` if there is one.

    `encode` may be a faster writer of the same lines.
    """

    def __init__(
        self,
        sink: Callable[[str], object] | None = None,
        encode: Callable[[Sequence[Any]], bytes] = encode_line,
    ) -> None:
        self._hash = hashlib.sha256()
        self._sink = sink
        self._encode = encode

    def open(
        self,
        now: float,
        config: SchedulerConfig,
        cost_model: CostModel,
        num_device_blocks: int,
        num_host_blocks: int = 0,
    ) -> None:
        """Write what a scheduler is built from; whoever replays builds a fresh one here."""
        settings = dataclasses.asdict(config) | {"eos_token_ids": sorted(config.eos_token_ids)}
        costs = dataclasses.asdict(cost_model)
        self.write("open", now, settings, costs, num_device_blocks, num_host_blocks)

    def write(self, kind: str, now: float, *fields: Any) -> None:
        """Append one line."""
        line = self._encode([kind, now.hex(), *fields]) + b"\n"
        self._hash.update(line)
        if self._sink is not None:
            self._sink(line.decode())

    @property
    def sha256(self) -> str:
        """Return the hash of everything written so far."""
        return self._hash.hexdigest()


class JournaledScheduler(Scheduler):
    """A Scheduler that writes down what it is told and what it answers."""

    def __init__(self, *parts: Any, journal: Journal) -> None:
        """Take the parts of a Scheduler and the journal to write to."""
        super().__init__(*parts)
        self._journal = journal

    def add(self, arrival: Arrival, now: float) -> int:
        """Write the request down and add it."""
        self._journal.write("add", now, written(arrival))
        return super().add(arrival, now)

    def abort(self, handle: int, now: float) -> RequestUpdate | None:
        """Write the abort down and do it."""
        self._journal.write("abort", now, handle)
        return super().abort(handle, now)

    def finish(self, handle: int, num_output_tokens: int, now: float) -> RequestUpdate | None:
        """Write the finish down and do it."""
        self._journal.write("finish", now, handle, num_output_tokens)
        return super().finish(handle, num_output_tokens, now)

    def schedule(self, now: float, can_compute: bool) -> SchedulerOutput | None:
        """Write the question and the plan down."""
        plan = super().schedule(now, can_compute)
        self._journal.write("schedule", now, can_compute, plan)
        return plan

    def update(self, output: ExecutorOutput, now: float) -> list[RequestUpdate]:
        """Write down what finished: ids and times, not log probabilities, which decide nothing."""
        self._journal.write("update", now, [_outcome(done) for done in output.steps], output.copies)
        return super().update(output, now)


def written(arrival: Arrival) -> dict[str, Any]:
    """Return an arrival as a line has it; `read_arrival` is the way back."""
    fields = {spec.name: getattr(arrival, spec.name) for spec in dataclasses.fields(arrival)}
    exact = {"age_s": arrival.age_s.hex(), "block_hashes": [h.hex() for h in arrival.block_hashes]}
    return fields | exact


def read_arrival(fields: Mapping[str, Any]) -> Arrival:
    """Return the arrival of a parsed line."""
    prompt, params = fields["prompt_token_ids"], fields["params"]
    biases = {int(token_id): bias for token_id, bias in params["logit_bias"].items()}
    read = {
        "prompt_token_ids": range(*prompt["range"]) if isinstance(prompt, Mapping) else prompt,
        "params": SamplingParams(**(params | {"logit_bias": biases})),
        "age_s": float.fromhex(fields["age_s"]),
        "block_hashes": [bytes.fromhex(item) for item in fields["block_hashes"]],
    }
    return Arrival(**{**fields, **read})


def _outcome(done: StepDone) -> list[Any]:
    """Return what a step came to; the reason is there only where it failed."""
    ids = [sample.token_id for sample in done.samples]
    fields: list[Any] = [done.step_id, ids, done.device_s.hex()]
    return fields if done.error is None else [*fields, done.error]
