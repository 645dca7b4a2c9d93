"""What the driver and the ranks of a distributed model say to each other: closed schemas.

Rules: every message is one of the structs below, msgpack with a tag; unknown tags and wrong types
are refused by the decoder. Orders go out, reports come back. The first order says all that a rank
has in common with the others, and which one it is; then `Allocate`, then plans. A plan is the
core's own, the same bytes for every rank. A rank says each second that it is there, whatever it is
at; a rank that says nothing is taken for dead.
Must not know: whose sockets these are, how a plan is carried out.
"""

from __future__ import annotations

import msgspec

from fastserve.core.messages import SchedulerOutput, StepDone
from fastserve.settings.engine import EngineConfig
from fastserve.settings.scheduler import StepLimits
from fastserve.wire.engine_messages import Progress

BEAT_S = 1.0
"""A rank says that it is there at least so often."""

NOT_STARTED = -1
"""The step that a rank is at before its first one."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a rank runs, and beside how many."""

    host: str
    local_rank: int  # among the ranks of this host: which device it takes
    num_local_ranks: int  # that share cores and memory of this host
    reserved_cores: int = 0  # of this host, left to others
    model_dir: str | None = None  # where this host has the model, if not where the driver has it


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """The first order: meet the other ranks, and read the weights of one's own part."""

    rank: int
    place: Place
    rendezvous: str  # where the ranks meet: a URL of torch.distributed's
    config: EngineConfig
    model_dir: str
    device_type: str
    dtype: str
    max_model_len: int
    limits: StepLimits
    eos_token_ids: frozenset[int]
    is_poisoned: bool = False
    is_checked: bool = False


class Allocate(msgspec.Struct, frozen=True, tag="allocate"):
    """Make the KV: so many blocks of each tier, as agreed."""

    num_device_blocks: int
    num_host_blocks: int


class Touch(msgspec.Struct, frozen=True, tag="touch"):
    """Make the first blocks real memory, and forget what is in them."""

    num_blocks: int


class MeasureCopies(msgspec.Struct, frozen=True, tag="measure_copies"):
    """Measure copies between the tiers, while no block is in use."""


class CountMoves(msgspec.Struct, frozen=True, tag="count_moves"):
    """Say how many blocks have moved, and how many came back changed."""


class Carry(msgspec.Struct, frozen=True, tag="carry"):
    """Carry out a plan: its copies at once, the rest in its turn."""

    plan: SchedulerOutput


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """End: the driver is through. Without it, the end of the connection is that of the driver."""


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """The rank is there; `step_id` is the last step that it has begun."""

    step_id: int


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """The weights are there, and so much room is left for KV."""

    block_bytes: int  # of a KV block: this rank's layers and KV heads
    cpu_kernels: str
    num_threads: int
    num_device_blocks: int
    num_host_blocks: int


class Allocated(msgspec.Struct, frozen=True, tag="allocated"):
    """Plans can be carried out from now on."""


class CopiesMeasured(msgspec.Struct, frozen=True, tag="copies_measured"):
    """Seconds of a copy: base_s + block_s · blocks."""

    base_s: float
    block_s: float


class MovesCounted(msgspec.Struct, frozen=True, tag="moves_counted"):
    """Blocks that moved between the tiers, and those that are not what they were."""

    num_moves: int
    num_mismatches: int


class StepEnded(msgspec.Struct, frozen=True, tag="step_ended"):
    """A stage is through with a step; the last one says what was drawn.

    Its `device_s` are the seconds of this stage alone, without those of waiting for another.
    """

    step: StepDone


class CopyEnded(msgspec.Struct, frozen=True, tag="copy_ended"):
    """A copy is over on this rank."""

    copy_id: int
    is_done: bool


class RankFailed(msgspec.Struct, frozen=True, tag="rank_failed"):
    """The rank is over; one line says why. With `is_of_peer` it is only that another is gone."""

    message: str
    is_misconfiguration: bool = False
    is_of_peer: bool = False


Order = Load | Allocate | Touch | MeasureCopies | CountMoves | Carry | Leave
Report = (
    Beat
    | Progress
    | Loaded
    | Allocated
    | CopiesMeasured
    | MovesCounted
    | StepEnded
    | CopyEnded
    | RankFailed
)

_order_decoder: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_report_decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def decode_order(payload: bytes) -> Order:
    """Return the order in a payload; msgspec.ValidationError (a ValueError) if it is none."""
    return _order_decoder.decode(payload)


def decode_report(payload: bytes) -> Report:
    """Return the report in a payload; msgspec.ValidationError (a ValueError) if it is none."""
    return _report_decoder.decode(payload)
