"""Streams: what is needed to run a request once more, its age included."""

from __future__ import annotations

import asyncio

import pytest

from fastserve.client.streams import RequestStream, merged
from fastserve.core.build import build_scheduler
from fastserve.core.messages import RequestUpdate, Sample, TokenLogprobs
from fastserve.core.request import Arrival, FinishReason, Handle, SamplingParams
from fastserve.engine.engine import Engine
from fastserve.sim.clock import VirtualClock
from fastserve.wire.engine_messages import Abort, Add, Finish, RequestNumber, decode_command
from fastserve.wire.frames import encode_frame
from tests.core.harness import UNIT_COST, small_config
from tests.fake_executor import FakeExecutor
from tests.framing import payload_of


class Owner:
    """Hears nothing."""

    def tell(self, command: Abort | Finish) -> None:
        """Hear nothing."""

    def drop(self, stream: RequestStream) -> None:
        """Drop nothing."""


def sent(add: Add) -> Arrival:
    """Return the arrival as the engine process decodes it."""
    command = decode_command(payload_of(encode_frame(add)))
    assert isinstance(command, Add)
    return command.arrival


def test_the_age_is_measured_when_the_request_is_sent() -> None:
    """It counts from the arrival, over any number of engine processes, and what was known then."""
    stream = RequestStream(
        Owner(), RequestNumber(3), Arrival([1, 2], SamplingParams(), age_s=2.0), now=100.0
    )
    first = sent(stream.as_command(now=100.0))
    stream.push(RequestUpdate(Handle(0), [Sample(7), Sample(8)]))
    again = sent(stream.as_command(now=150.0))
    assert (first.age_s, first.output_token_ids) == (2.0, ())
    assert (again.age_s, again.output_token_ids) == (52.0, (7, 8))


@pytest.mark.parametrize("origin", [0.0, 5000.0])
def test_a_restart_keeps_ages_whatever_the_clock_of_the_engine(origin: float) -> None:
    """Oldest first stays so: a new engine, with a clock of its own, knows how long each waited."""
    streams = [
        RequestStream(
            Owner(),
            RequestNumber(n),
            Arrival([n, 1], SamplingParams(max_tokens=1, seed=n)),
            now=10.0 * n,
        )
        for n in range(3)
    ]
    clock = VirtualClock()
    clock.time = origin
    executor = FakeExecutor(clock, 4)
    engine = Engine(build_scheduler(small_config(), UNIT_COST, 64), executor, clock)
    for stream in streams:
        engine.add(sent(stream.as_command(now=40.0)))
    ages = []
    while not engine.is_idle:
        for update in engine.step():
            assert update.metrics is not None
            ages.append(origin - update.metrics.arrival)
    assert ages == [40.0, 30.0, 20.0]


def test_an_update_of_scores_that_were_seen_wakes_nobody() -> None:
    """It would reach the client as an event without anything in it."""
    params = SamplingParams(max_tokens=5, prompt_logprobs=0)
    stream = RequestStream(Owner(), RequestNumber(3), Arrival([1, 2], params), now=0.0)
    scored = RequestUpdate(Handle(0), (), prompt_logprobs=[TokenLogprobs(-1.0, 1, (), ())])
    stream.as_command(now=0.0)
    stream.push(scored)

    async def read() -> list[RequestUpdate]:
        first = await anext(stream)
        stream.as_command(now=1.0)
        stream.push(scored)
        stream.end()
        return [first] + [update async for update in stream]

    assert asyncio.run(read()) == [scored]


def test_merged_updates_keep_every_sample() -> None:
    """Updates that a slow reader missed are one update with all samples and the last word."""
    scores = TokenLogprobs(-0.5, 1, (), ())
    first = RequestUpdate(Handle(4), (Sample(1), Sample(2)), prompt_logprobs=(scores,))
    last = RequestUpdate(Handle(4), (Sample(3),), FinishReason.STOP, 9)
    assert merged([first, last]) == RequestUpdate(
        Handle(4), [Sample(1), Sample(2), Sample(3)], FinishReason.STOP, 9, None, [scores]
    )
