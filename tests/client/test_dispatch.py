"""The dispatcher over engines that only take notes: who is given what, and exactly one end."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastserve.client.dispatch import Dispatcher
from fastserve.client.engine_link import EngineLink
from fastserve.client.interfaces import EngineDeadError
from fastserve.client.metrics import EngineMetrics
from fastserve.client.streams import RequestStream
from fastserve.core.messages import RequestFailedError, RequestUpdate, Sample
from fastserve.core.request import Arrival, FinishReason, Handle, SamplingParams
from fastserve.wire.engine_messages import (
    Abort,
    Add,
    EngineInfo,
    Finish,
    Rejected,
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


class Notes:
    """A child process that only takes notes."""

    def __init__(self) -> None:
        self.commands: list[object] = []

    def send(self, frame: bytes) -> None:
        self.commands.append(decode_command(payload_of(frame)))


def loaded_link() -> tuple[EngineLink, Notes]:
    """Return a link whose process has loaded, and what it will have been told."""
    notes = Notes()
    link = EngineLink(notes)  # type: ignore[arg-type]
    link.is_serving = True
    return link, notes


def token(number: int, position: int) -> int:
    """Return the id that any engine draws at a position of a request."""
    return 7 * number + position


@dataclasses.dataclass
class Served:
    """A request, and what engines have drawn for it."""

    stream: RequestStream
    ids: list[int] = dataclasses.field(default_factory=list)  # drawn so far


class DispatcherMachine(RuleBasedStateMachine):
    """Any order of arrivals, tokens, ends, deaths and restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatcher = Dispatcher(EngineMetrics("m"))
        self.link: EngineLink | None = None
        self.notes = Notes()
        self.requests: list[Served] = []

    @rule()
    def submit(self) -> None:
        """A request arrives; whether an engine is there or not."""
        number = len(self.requests)
        params = SamplingParams(seed=number, max_tokens=50)
        stream = self.dispatcher.submit(Arrival([number], params))
        assert stream.number == number
        self.requests.append(Served(stream))

    @rule(n=st.integers(1, 3))
    def submit_choices(self, n: int) -> None:
        """A prompt arrives of which several answers are wanted: it is sent once, or not at all."""
        first = len(self.requests)
        num_commands = len(self.notes.commands)
        streams = self.dispatcher.submit_choices(
            Arrival([first], SamplingParams(seed=first + i, max_tokens=50)) for i in range(n)
        )
        assert [stream.number for stream in streams] == list(range(first, first + n))
        self.requests += map(Served, streams)
        sent = self.notes.commands[num_commands:]
        numbers = [add.numbers for add in sent if isinstance(add, Add)]
        assert numbers in ([], [tuple(range(first, first + n))])

    @precondition(lambda self: self.link is None)
    @rule()
    def load(self) -> None:
        """A process has loaded; it must be given each open request once, with its ids so far."""
        self.link, self.notes = loaded_link()
        self.dispatcher.begin(self.link, INFO)

    @precondition(lambda self: self.link is not None)
    @rule()
    def die(self) -> None:
        """The process dies without a word."""
        assert self.link is not None
        self.link.is_serving = False
        self.dispatcher.lost(self.link, "it was told to")
        self.link = None

    @rule(data=st.data(), count=st.integers(1, 3), ends=st.booleans())
    def speak(self, data: st.DataObject, count: int, ends: bool) -> None:
        """The process says tokens of a request that it has."""
        served = self.draw_given(data)
        if served is None:
            return
        number = served.stream.number
        start = len(served.ids)
        ids = [token(number, start + i) for i in range(count)]
        served.ids += ids
        reason = FinishReason.LENGTH if ends else None
        update = RequestUpdate(Handle(0), [Sample(i) for i in ids], reason)
        self.dispatcher.receive(Updates([(number, update)]))

    @rule(data=st.data())
    def reject(self, data: st.DataObject) -> None:
        """The process says that a request can never run."""
        served = self.draw_given(data)
        if served is not None:
            self.dispatcher.receive(Rejected(served.stream.number, "too long"))

    @rule(data=st.data(), number=st.integers(0, 20))
    def abort(self, data: st.DataObject, number: int) -> None:
        """A client leaves, perhaps one whose request has ended."""
        if number < len(self.requests):
            self.requests[number].stream.abort()

    @rule(number=st.integers(0, 20))
    def finish(self, number: int) -> None:
        """A stop string matched."""
        if number < len(self.requests):
            stream = self.requests[number].stream
            stream.finish(len(stream.output_token_ids))

    def draw_given(self, data: st.DataObject) -> Served | None:
        """Choose an open request that the process has."""
        given = [r for r in self.requests if self.link and self.link.has(r.stream.number)]
        return data.draw(st.sampled_from(given)) if given else None

    @invariant()
    def check(self) -> None:
        """Ids are those drawn; the process was given an open request at most once, and whole."""
        is_open = [not served.stream.is_ended for served in self.requests]
        assert len(self.dispatcher.streams) == sum(is_open)
        for number, served in enumerate(self.requests):
            assert served.stream.output_token_ids == served.ids
            assert (served.stream.number in self.dispatcher.streams) == is_open[number]
        adds = [c for c in self.notes.commands if isinstance(c, Add)]
        numbers = [number for add in adds for number in add.numbers]
        known = set(numbers)
        assert len(known) == len(numbers)
        for add in adds:
            ids = list(add.arrival.output_token_ids)
            assert ids == self.requests[add.number].ids[: len(ids)]
            assert add.arrival.params.seed == add.number
            assert all(sibling.seed == sibling.number for sibling in add.siblings)
        told = [c for c in self.notes.commands if isinstance(c, (Abort, Finish))]
        assert all(command.number in known for command in told)

    def teardown(self) -> None:
        """When the engine is given up, every stream has one end and raises why."""
        self.dispatcher.end_all("over")
        assert len(self.dispatcher.streams) == 0
        for served in self.requests:
            asyncio.run(read_to_the_end(served))


def test_an_end_that_lets_others_go_on_may_end_them_too() -> None:
    """Two suspects whose text is complete: the end of the one under trial ends the other."""
    machine = DispatcherMachine()
    machine.submit_choices(3)
    machine.load()
    machine.submit()
    machine.submit()
    machine.die()
    machine.load()
    machine.die()
    machine.finish(4)
    for _ in range(3):
        machine.load()
        machine.die()
    machine.finish(3)
    machine.load()
    machine.check()
    assert all(machine.requests[number].stream.is_ended for number in (3, 4))
    machine.teardown()


async def read_to_the_end(served: Served) -> None:
    """Read a stream: the ids drawn, at most one terminal update, and that one last."""
    ids: list[int] = []
    reasons: list[FinishReason | None] = []
    try:
        async for update in served.stream:
            ids += [sample.token_id for sample in update.samples]
            reasons.append(update.finish_reason)
    except (EngineDeadError, RequestFailedError, ValueError):
        reasons.append(FinishReason.ERROR)
    assert ids == served.ids
    assert all(reason is None for reason in reasons[:-1])


TestDispatcher = DispatcherMachine.TestCase
TestDispatcher.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("num_others", [0, 3])
def test_what_kills_every_process_ends_alone(num_others: int) -> None:
    """Charged twice, a request runs before all others, by itself; a third death is its own."""
    dispatcher = Dispatcher(EngineMetrics("m"))
    arrival = Arrival([1], SamplingParams(seed=1, max_tokens=5))
    streams = [dispatcher.submit(arrival) for _ in range(1 + num_others)]
    for death in range(3):
        link, notes = loaded_link()
        dispatcher.begin(link, INFO)
        on_trial = death == 2
        assert len(notes.commands) == (1 if on_trial else len(streams))
        link.is_serving = False
        assert dispatcher.lost(link, "boom") == on_trial
    assert isinstance(streams[0].error, RequestFailedError)
    assert [stream.is_ended for stream in streams] == [True] + [False] * num_others
