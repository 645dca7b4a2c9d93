"""The wire between driver and ranks: everything arrives as it was sent, and nothing else does."""

from __future__ import annotations

import msgspec
import pytest

from fastserve.core.messages import (
    Copy,
    CopyDirection,
    NewRequest,
    Sample,
    SchedulerOutput,
    StepDone,
    TokenLogprobs,
    Work,
)
from fastserve.core.request import Handle, SamplingParams
from fastserve.settings.engine import EngineConfig
from fastserve.settings.scheduler import StepLimits
from fastserve.wire.engine_messages import Abort, Progress, RequestNumber
from fastserve.wire.frames import encode_frame
from fastserve.wire.rank_messages import (
    Allocate,
    Allocated,
    Beat,
    Carry,
    CopiesMeasured,
    CopyEnded,
    CountMoves,
    Leave,
    Load,
    Loaded,
    MeasureCopies,
    MovesCounted,
    Order,
    Place,
    RankFailed,
    Report,
    StepEnded,
    Touch,
    decode_order,
    decode_report,
)
from tests.framing import payload_of

PARAMS = SamplingParams(temperature=0.5, seed=2**63 - 1, logit_bias={7: -1.5}, logprobs=3)
PLAN = SchedulerOutput(
    9,
    (NewRequest(Handle(3), 1, 40, PARAMS, (5, 6)),),
    (Work(Handle(3), 1, 2, 3, (7, 8, 9), 0, (4, 2), True, "all"),),
    (Copy(1, CopyDirection.SWAP_OUT, (0, 1), (5, 4)),),
    (Handle(1), Handle(2)),
)
SCORES = TokenLogprobs(-0.25, 2, (5, 6), (-0.1, float("-inf")))
ORDERS: list[Order] = [
    Load(
        rank=3,
        place=Place(host="a", local_rank=1, num_local_ranks=2, reserved_cores=1, model_dir="/m"),
        rendezvous="file:///tmp/x",
        config=EngineConfig(tensor_parallel_size=2, pipeline_parallel_size=2),
        model_dir="/models/m",
        device_type="cpu",
        dtype="float32",
        max_model_len=128,
        limits=StepLimits(4, 64),
        eos_token_ids=frozenset({1, 2}),
        is_checked=True,
    ),
    Allocate(7, 9),
    Touch(3),
    MeasureCopies(),
    CountMoves(),
    Carry(PLAN),
    Leave(),
]
REPORTS: list[Report] = [
    Beat(17),
    Progress("loading weights", 0.5),
    Loaded(
        block_bytes=99, cpu_kernels="torch", num_threads=2, num_device_blocks=4, num_host_blocks=5
    ),
    Allocated(),
    CopiesMeasured(1e-4, 2e-5),
    MovesCounted(8, 0),
    StepEnded(StepDone(9, (Sample(4, SCORES), Sample(5)), 0.25, {Handle(3): (SCORES,)})),
    CopyEnded(1, True),
    RankFailed("no weights", is_misconfiguration=True),
    RankFailed("the other is gone", is_of_peer=True),
]


def canonical(message: object) -> bytes:
    """Return an encoding in which lists and tuples are one."""
    return msgspec.msgpack.encode(message)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: type(order).__name__)
def test_orders_arrive_as_sent(order: Order) -> None:
    """Every order survives the wire with its type and all of its values."""
    arrived = decode_order(payload_of(encode_frame(order)))
    assert type(arrived) is type(order)
    assert canonical(arrived) == canonical(order)


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: type(report).__name__)
def test_reports_arrive_as_sent(report: Report) -> None:
    """Every report survives the wire with its type and all of its values."""
    arrived = decode_report(payload_of(encode_frame(report)))
    assert type(arrived) is type(report)
    assert canonical(arrived) == canonical(report)


def test_a_plan_is_the_core_s_own_on_the_other_side() -> None:
    """Its parts are what a worker takes, of the same types."""
    arrived = decode_order(payload_of(encode_frame(Carry(PLAN))))
    assert isinstance(arrived, Carry)
    assert type(arrived.plan) is SchedulerOutput
    assert [type(part[0]) for part in arrived.plan[1:4]] == [NewRequest, Work, Copy]
    assert arrived.plan.copies == PLAN.copies
    assert arrived.plan.num_tokens == 3


@pytest.mark.parametrize(
    "payload",
    [
        payload_of(encode_frame(Abort(RequestNumber(3)))),
        msgspec.msgpack.encode({"type": "allocate", "num_device_blocks": "many"}),
        b"\x80\x04K\x01.",  # a pickle
    ],
)
def test_nothing_else_is_an_order_or_a_report(payload: bytes) -> None:
    """Another wire's message, a wrong type, and what no schema knows."""
    for decode in (decode_order, decode_report):
        with pytest.raises(ValueError):  # noqa: PT011 - msgspec's own, of many texts
            decode(payload)
