"""The wire: everything arrives as it was sent, and nothing else is accepted."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
from hypothesis import given

from fastserve.core.messages import (
    Forecasts,
    RequestMetrics,
    RequestUpdate,
    Sample,
    SchedulerStats,
    TokenLogprobs,
)
from fastserve.core.request import Arrival, FinishReason, Handle, SamplingParams
from fastserve.settings.engine import EngineConfig
from fastserve.wire.engine_messages import (
    Abort,
    Add,
    Alive,
    Command,
    Configure,
    EngineInfo,
    EngineStats,
    Event,
    Failed,
    Finish,
    Progress,
    Ready,
    Rejected,
    RequestNumber,
    Sibling,
    Updates,
    checked,
    decode_command,
    decode_event,
)
from fastserve.wire.frames import encode_frame
from tests.core.arrivals import arrivals
from tests.core.harness import UNIT_COST
from tests.framing import payload_of

METRICS = RequestMetrics(
    arrival=1.5, first_scheduled=None, first_token=2.0, finished=3.0, queue_s=0.1,
    num_preemptions=1, num_swaps=0, swap_s=0.0, recomputed_tokens=7, cached_tokens=16, level=2,
    predicted_output_tokens=40.5,
)  # fmt: skip
SCORES = TokenLogprobs(-0.25, 2, [5, 6], [-0.1, -0.25])
STATS = SchedulerStats(
    num_running=1, num_waiting=2, num_preempted=3, requests_by_level={0: 4, 3: 2},
    device_blocks_total=10, device_blocks_free=4, device_blocks_cached=1, device_blocks_used=5,
    host_blocks_total=0, host_blocks_free=0, host_blocks_cached=0, host_blocks_moving=0,
    host_blocks_used=0, device_blocks_moving=0, num_swaps=0, num_swapped_out_blocks=0,
    num_swapped_in_blocks=0, num_saved_blocks=0, num_fetched_blocks=0, num_clean_blocks=0,
    num_failed_copies=0, copy_wait_s=0.0, num_steps=9, num_preemptions=1, num_demotions=2,
    num_promotions=3, num_recomputed_tokens=4, num_computed_prompt_tokens=5,
    num_cached_prompt_tokens=6, num_dropped_samples=7, num_stalls=0,
    forecasts=Forecasts(
        num_by_decile=[1, 0, 0, 2, 0, 0, 0, 0, 3, 4], predicted_tokens=99.5, answered_tokens=90,
        work_s=12.5, mean_work_s=8.25,
    ),
    requests_by_work=[0, 3, 2, 1, 0],
)  # fmt: skip
INFO = EngineInfo(
    model="demo", max_model_len=128, max_request_tokens=64, vocab_size=99, block_size=16,
    num_device_blocks=4, num_host_blocks=6, block_bytes=1000, eos_token_ids=frozenset({1, 2}),
    dtype="float32", device="cpu", cost_model=UNIT_COST, max_num_seqs=8,
    enable_prefix_caching=True,
    sampling_defaults={"temperature": 0.7, "top_k": 20},
)  # fmt: skip
PARAMS = SamplingParams(
    n=2, temperature=0.0, seed=2**63 - 1, logit_bias={7: -1.5}, logprobs=3, max_tokens=None,
    stop=["\n", "é"], stop_token_ids=[4],
)  # fmt: skip

COMMANDS: list[Command] = [
    Configure(EngineConfig(model="some/where", num_device_blocks=7, starvation_limit=1.0), 1),
    Add(RequestNumber(0), Arrival([1, 2**31], PARAMS, age_s=12.25)),
    Add(RequestNumber(0), Arrival([1], PARAMS), (Sibling(RequestNumber(1), -(2**63)),)),
    Add(
        RequestNumber(1),
        Arrival(
            [3], SamplingParams(stop_token_ids=[]), output_token_ids=[4, 5],
            block_hashes=[b"\0\xff"], priority=-3, client="a", cache_salt="é",
        ),
    ),
    Abort(RequestNumber(3)),
    Finish(RequestNumber(4), 17),
]  # fmt: skip
EVENTS: list[Event] = [
    Alive(),
    Progress("loading", 0.5),
    Ready(INFO),
    Updates([(RequestNumber(7), RequestUpdate(Handle(0), [Sample(4), Sample(5, SCORES)]))]),
    Updates(
        [
            (
                RequestNumber(7),
                RequestUpdate(Handle(0), [], FinishReason.STOP, 4, METRICS, [SCORES]),
            ),
            (
                RequestNumber(8),
                RequestUpdate(Handle(1), [Sample(9)], FinishReason.LENGTH, None, METRICS),
            ),
        ],
        EngineStats(
            scheduler=STATS,
            num_requests=6,
            scheduler_s=0.5,
            device_s=2.0,
            at=9.0,
            steps_by_tokens=[1, 0, 2],
            step_tokens=18,
        ),
    ),
    Rejected(RequestNumber(3), "no"),
    Failed("over"),
]


def canonical(message: object) -> bytes:
    """Return an encoding in which lists and tuples are one."""
    return msgspec.msgpack.encode(message)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: type(command).__name__)
def test_commands_arrive_as_sent(command: Command) -> None:
    """Every command survives the wire with its type and all of its values."""
    arrived = decode_command(payload_of(encode_frame(command)))
    assert type(arrived) is type(command)
    assert canonical(arrived) == canonical(command)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_events_arrive_as_sent(event: Event) -> None:
    """Every event survives the wire with its type and all of its values."""
    arrived = decode_event(payload_of(encode_frame(event)))
    assert type(arrived) is type(event)
    assert canonical(arrived) == canonical(event)
    if isinstance(arrived, Updates):
        assert all(type(update) is RequestUpdate for _, update in arrived.updates)


@given(arrivals())
def test_an_arrival_arrives_as_sent(arrival: Arrival) -> None:
    """Every field of it, to the last bit, and as immutable as it was."""
    arrived = decode_command(payload_of(encode_frame(Add(RequestNumber(3), arrival))))
    assert arrived == Add(RequestNumber(3), arrival)
    assert checked(arrival) == arrival


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_token_ids": [1, "2"]},
        {"prompt_token_ids": [1, 2.5]},
        {"params": SamplingParams(stop_token_ids=["a"])},  # type: ignore[list-item]
        {"priority": "high"},
        {"client": 7},
    ],
    ids=str,
)
def test_what_the_wire_cannot_carry_is_refused_before_it_is_sent(change: dict[str, Any]) -> None:
    """A wrong type anywhere in an arrival is a ValueError."""
    with pytest.raises(ValueError, match="Expected"):
        checked(dataclasses.replace(Arrival([1], PARAMS), **change))


def test_params_arrive_as_their_own_class() -> None:
    """Parameters are checked anew on arrival: the class is built, with its properties."""
    arrived = decode_command(payload_of(encode_frame(COMMANDS[1])))
    assert isinstance(arrived, Add)
    assert isinstance(arrived.arrival.params, SamplingParams)
    assert arrived.arrival.params.stop_strings == ("\n", "é")
    assert arrived.arrival.params.is_greedy
    assert arrived.arrival.params.logit_bias == {7: -1.5}


@pytest.mark.parametrize(
    "payload",
    [
        {"type": "sideways"},
        {"type": "abort"},
        {"type": "abort", "request": "1"},
        {"type": "failed", "message": "an event is no command"},
        {"type": "add", "request": 1,
         "arrival": {"prompt_token_ids": [1], "params": {"top_p": 7}}},
        ["abort", 1],
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_command_is_refused(payload: object) -> None:
    """Unknown tags, missing and mistyped fields and invalid parameters are ValueErrors."""
    with pytest.raises(ValueError, match=r"."):
        decode_command(msgspec.msgpack.encode(payload))
