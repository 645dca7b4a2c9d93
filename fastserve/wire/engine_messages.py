"""What the API process and the engine process say to each other: closed schemas.

Rules: every message is one of the structs below, msgpack with a tag; unknown tags and wrong types
are refused by the decoder. What the core already defines (updates, params, stats) travels as it
is. One `Updates` a step carries the news of all requests; the choices of a prompt come with it in
one `Add`. A request is named by the number that the
API process gave it, so that it keeps its name over a restart; the handle within an update is the
engine's own, and means nothing to the API process.
Must not know: sockets' owners, the scheduler, text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, NewType

import msgspec

from fastserve.core.cost_model import CostModel
from fastserve.core.messages import RequestUpdate, SchedulerStats
from fastserve.core.request import Arrival
from fastserve.settings.engine import EngineConfig
from fastserve.settings.server import ENGINE_TIMEOUT_S


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded engine is; measured, never written back to the configuration."""

    model: str
    max_model_len: int
    max_request_tokens: int  # the window, or the whole pool where that is smaller
    vocab_size: int
    block_size: int
    num_device_blocks: int
    num_host_blocks: int
    block_bytes: int  # of KV, on all ranks together
    eos_token_ids: frozenset[int]
    dtype: str
    device: str
    cost_model: CostModel
    max_num_seqs: int
    enable_prefix_caching: bool
    quantization: str | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    sampling_defaults: dict[str, Any] = {}


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the engine; the seconds only grow."""

    scheduler: SchedulerStats
    num_requests: int
    scheduler_s: float  # spent in deciding: schedule and update
    device_s: float  # spent by the executor in steps
    steps_by_tokens: Sequence[int]  # those done, in the buckets of STEP_TOKENS
    step_tokens: int  # computed in all of those
    at: float


class Configure(msgspec.Struct, frozen=True, tag="configure"):
    """The first message: what to load, and which of `data_parallel_size` replicas to be.

    A process that does not get on for `engine_timeout_s` ends, and one that is not heard for so
    long is killed. One that stands in for another `is_restart`: requests wait for it.
    """

    config: EngineConfig
    replica: int = 0
    engine_timeout_s: float = ENGINE_TIMEOUT_S
    is_restart: bool = False


RequestNumber = NewType("RequestNumber", int)
"""Names a request for the API process, and on this wire; it outlives the engine process."""


class Sibling(NamedTuple):
    """A further choice of a prompt: all that it has of its own."""

    number: RequestNumber
    seed: int


class Add(msgspec.Struct, frozen=True, tag="add"):
    """Run a request, or go on with one that an engine process before this one had.

    Its `siblings` arrive with it, and are as it is but for their seed; they score no prompt.
    """

    number: RequestNumber
    arrival: Arrival
    siblings: tuple[Sibling, ...] = ()

    @property
    def numbers(self) -> tuple[RequestNumber, ...]:
        """The requests that this adds."""
        return (self.number, *(sibling.number for sibling in self.siblings))


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Give a request up; its terminal update follows."""

    number: RequestNumber


class Finish(msgspec.Struct, frozen=True, tag="finish"):
    """A stop string ended the request after `num_output_tokens`; its terminal update follows."""

    number: RequestNumber
    num_output_tokens: int


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """What loading is at, and how much of that is done (0 to 1)."""

    stage: str
    fraction: float


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Loaded; requests are run from now on."""

    info: EngineInfo


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """Said every `beat_interval_s`, whatever the process is at, unless what it is at hangs."""


class Updates(msgspec.Struct, frozen=True, tag="updates"):
    """The news of one step, and now and then a snapshot."""

    updates: Sequence[tuple[RequestNumber, RequestUpdate]] = ()
    stats: EngineStats | None = None


class Rejected(msgspec.Struct, frozen=True, tag="rejected"):
    """The request can never run; the message is for its client."""

    number: RequestNumber
    message: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine is over; one line says why, `running` whose steps were under way."""

    message: str
    is_misconfiguration: bool = False
    running: tuple[RequestNumber, ...] = ()


Command = Configure | Add | Abort | Finish
Event = Progress | Ready | Alive | Updates | Rejected | Failed

_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_arrival_decoder: msgspec.msgpack.Decoder[Arrival] = msgspec.msgpack.Decoder(Arrival)
_event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def beat_interval_s(engine_timeout_s: float) -> float:
    """Return the seconds between two signs of life of a process."""
    return min(1.0, engine_timeout_s / 10)


def checked(arrival: Arrival) -> Arrival:
    """Return an arrival as the wire carries it; ValueError where a value is of a wrong type.

    The ids, which may be many, are only looked at; the rest goes there and back.
    """
    ids = msgspec.convert(tuple(arrival.prompt_token_ids), tuple[int, ...])
    rest = msgspec.msgpack.encode(dataclasses.replace(arrival, prompt_token_ids=()))
    return dataclasses.replace(_arrival_decoder.decode(rest), prompt_token_ids=ids)


def decode_command(payload: bytes) -> Command:
    """Return the command in a payload; msgspec.ValidationError (a ValueError) if it is none."""
    return _command_decoder.decode(payload)


def decode_event(payload: bytes) -> Event:
    """Return the event in a payload; msgspec.ValidationError (a ValueError) if it is none."""
    return _event_decoder.decode(payload)
