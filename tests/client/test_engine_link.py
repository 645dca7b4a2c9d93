"""A link over a process that only takes notes: what it is told, and what is kept of its words."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from fastserve.client.engine_link import EngineLink
from fastserve.core.request import Arrival, SamplingParams
from fastserve.wire.engine_messages import (
    Abort,
    Add,
    EngineInfo,
    Event,
    Failed,
    Finish,
    Progress,
    Ready,
    RequestNumber,
    Updates,
    decode_command,
)
from tests.core.harness import UNIT_COST
from tests.framing import payload_of

INFO = EngineInfo(
    model="m", max_model_len=64, max_request_tokens=64, vocab_size=9, block_size=4,
    num_device_blocks=16, num_host_blocks=0, block_bytes=1000, eos_token_ids=frozenset(),
    dtype="float32", device="cpu", cost_model=UNIT_COST, max_num_seqs=8,
    enable_prefix_caching=True,
)  # fmt: skip


ONE, TWO = RequestNumber(1), RequestNumber(2)


class ScriptedChild:
    """A child process that says what it was made to, and takes notes of what it is told."""

    def __init__(self, *events: Event | Exception) -> None:
        self.commands: list[object] = []
        self.process = self
        self._events = events

    def kill(self) -> None:
        self.commands.append("killed")

    def send(self, frame: bytes) -> None:
        self.commands.append(decode_command(payload_of(frame)))

    async def events(self) -> AsyncGenerator[Event]:
        for event in self._events:
            if isinstance(event, Exception):
                raise event
            yield event

    def close(self) -> None:
        self.commands.append("closed")

    async def cause_of_death(self) -> str:
        return "the engine process died (exit status 1)"


def numbers(values: tuple[int, ...]) -> tuple[RequestNumber, ...]:
    """Return plain numbers as the API's numbers of requests."""
    return tuple(map(RequestNumber, values))


def heard(*events: Event | Exception) -> tuple[EngineLink, ScriptedChild, list[Event]]:
    """Return a link that has heard these events, its process, and what it passed on."""
    child = ScriptedChild(*events)
    link = EngineLink(child)  # type: ignore[arg-type]

    async def body() -> list[Event]:
        return [event async for event in link.events()]

    return link, child, asyncio.run(body())


def test_what_a_process_says_of_itself_is_kept_and_passed_on() -> None:
    """Progress, its sizes and that it serves; a message without figures leaves the last ones."""
    said = (Progress("loading weights", 0.5), Ready(INFO), Updates())
    link, _, passed_on = heard(*said)
    assert passed_on == list(said)
    assert link.progress == ("ready", 1.0)
    assert (link.info, link.stats, link.is_serving) == (INFO, None, True)


@pytest.mark.parametrize("is_serving", [True, False])
def test_a_command_reaches_only_a_process_that_has_the_request(is_serving: bool) -> None:
    """Others would take it for a request of their own; one that is gone hears nothing."""
    link, child, _ = heard(*([Ready(INFO)] if is_serving else []))
    link.give(Add(ONE, Arrival([5], SamplingParams())))
    link.tell(Abort(ONE))
    link.tell(Finish(TWO, 3))
    link.forget(ONE)
    link.tell(Abort(ONE))
    assert child.commands[1:] == ([Abort(ONE)] if is_serving else [])
    assert not link.has(ONE)


@pytest.mark.parametrize(("running", "present"), [((), [1, 2, 3]), ((2, 9), [2]), ((3, 1), [1, 3])])
def test_those_present_at_a_death_are_those_it_named(
    running: tuple[int, ...], present: list[int]
) -> None:
    """As far as they have not ended; all it had, where it named none."""
    link, child, _ = heard(Ready(INFO), Failed("an illegal address", running=numbers(running)))
    for number in (1, 2, 3):
        link.give(Add(RequestNumber(number), Arrival([5], SamplingParams())))
    assert link.present_at_death() == present
    assert asyncio.run(link.end()) == "an illegal address"
    assert not link.is_serving
    assert child.commands[-1] == "closed"


def test_one_that_cannot_be_understood_is_killed() -> None:
    """What it said before stands; why it died is that, and not the signal."""
    link, child, passed_on = heard(Ready(INFO), ValueError("unknown tag"), Updates())
    assert passed_on == [Ready(INFO)]
    assert child.commands == ["killed"]
    assert not link.is_serving
    reason = asyncio.run(link.end())
    assert reason == "the engine process cannot be understood: unknown tag"


def test_a_process_that_says_nothing_dies_of_its_status() -> None:
    """The cause is what its parent saw."""
    link, _, _ = heard(Ready(INFO))
    assert asyncio.run(link.end()) == "the engine process died (exit status 1)"
