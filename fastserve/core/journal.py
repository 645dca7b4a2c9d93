"""The journal: one line per fact and per plan, exact, so that a run can be told apart and replayed.

Rules: it is an observer of the engine. Times are written as `float.hex()`, so nothing is rounded;
lines are JSON arrays `[kind, now, …]`, the first of which has the number of the format. Same facts,
same plans, same hash, in any process. `read_fact` reads what `told` writes. Must not know: files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastserve.core.cost_model import CostModel
from fastserve.core.lengths import LengthModel
from fastserve.core.messages import (
    Aborted,
    ExecutorOutput,
    Fact,
    Finished,
    RequestUpdate,
    Sample,
    SchedulerOutput,
    StepDone,
)
from fastserve.core.request import Arrival, SamplingParams
from fastserve.settings.scheduler import SchedulerConfig

FORMAT = 3  # of the lines; another number where a reader of this one would go wrong


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
        length_model: LengthModel | None = None,
    ) -> None:
        """Write what a scheduler is built from: a replay builds a fresh one here.

        Of the `length_model` that is what it has learned so far; its floats read back as they are.
        """
        settings = dataclasses.asdict(config) | {"eos_token_ids": sorted(config.eos_token_ids)}
        costs = dataclasses.asdict(cost_model)
        learned = None if length_model is None else length_model.state()
        self.write(
            "open", now, FORMAT, settings, costs, num_device_blocks, num_host_blocks, learned
        )

    def told(self, fact: Fact, now: float) -> None:
        """Write a fact down."""
        match fact:
            case Arrival():
                self.write("add", now, _arrival_fields(fact))
            case Aborted(handle):
                self.write("abort", now, handle)
            case Finished(handle, num_output_tokens):
                self.write("finish", now, handle, num_output_tokens)
            case ExecutorOutput(steps, copies, failed_copies):
                done = [_step_fields(step) for step in steps]
                self.write("update", now, done, copies, failed_copies)

    def planned(self, plan: SchedulerOutput | None, can_compute: bool, now: float) -> None:
        """Write a question and its answer down."""
        self.write("schedule", now, can_compute, plan)

    def updated(self, output: ExecutorOutput, updates: Sequence[RequestUpdate], now: float) -> None:
        """Write nothing: news follow from the facts."""

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


def read_fact(kind: str, fields: Sequence[Any]) -> Fact:
    """Return the fact of a parsed line; LookupError, TypeError or ValueError if it is none."""
    match kind:
        case "add":
            return _read_arrival(*fields)
        case "abort":
            return Aborted(*fields)
        case "finish":
            return Finished(*fields)
        case "update":
            steps, copies, failed_copies = fields
            return ExecutorOutput(
                [_read_step(*step) for step in steps], tuple(copies), tuple(failed_copies)
            )
    raise ValueError(f"no fact is called {kind!r}")


def _arrival_fields(arrival: Arrival) -> dict[str, Any]:
    fields = {spec.name: getattr(arrival, spec.name) for spec in dataclasses.fields(arrival)}
    exact = {"age_s": arrival.age_s.hex(), "block_hashes": [h.hex() for h in arrival.block_hashes]}
    return fields | exact


def _read_arrival(fields: Mapping[str, Any]) -> Arrival:
    prompt, params = fields["prompt_token_ids"], fields["params"]
    biases = {int(token_id): bias for token_id, bias in params["logit_bias"].items()}
    read = {
        "prompt_token_ids": range(*prompt["range"]) if isinstance(prompt, Mapping) else prompt,
        "params": SamplingParams(**(params | {"logit_bias": biases})),
        "age_s": float.fromhex(fields["age_s"]),
        "block_hashes": [bytes.fromhex(item) for item in fields["block_hashes"]],
    }
    return Arrival(**{**fields, **read})


def _step_fields(done: StepDone) -> list[Any]:
    """Return what a step came to: no log probabilities, which decide nothing."""
    ids = [sample.token_id for sample in done.samples]
    fields: list[Any] = [done.step_id, ids, done.device_s.hex()]
    return fields if done.error is None else [*fields, done.error]


def _read_step(
    step_id: int, token_ids: Sequence[int], device_s: str, error: str | None = None
) -> StepDone:
    samples = [Sample(token_id) for token_id in token_ids]
    return StepDone(step_id, samples, float.fromhex(device_s), error=error)
