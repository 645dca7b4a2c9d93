"""The dispatcher over several replicas: each request is with one, a living one, and moves whole."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fastserve.client.dispatch import Dispatcher
from fastserve.client.engine_link import EngineLink
from fastserve.client.interfaces import EngineDeadError
from fastserve.client.metrics import EngineMetrics
from fastserve.client.streams import RequestStream
from fastserve.core.messages import RequestFailedError, RequestUpdate, Sample
from fastserve.core.request import Arrival, FinishReason, Handle, SamplingParams
from fastserve.wire.engine_messages import Add, RequestNumber, Updates
from tests.client.test_dispatch import INFO, Notes, Served, read_to_the_end, token

NUM_REPLICAS = 3


class Replicas:
    """A dispatcher, and replicas that only take notes."""

    def __init__(self, num_replicas: int = NUM_REPLICAS) -> None:
        self.dispatcher = Dispatcher(*(EngineMetrics("m", n) for n in range(num_replicas)))
        self.links: dict[int, EngineLink] = {}
        self.notes: dict[int, Notes] = {}

    def load(self, replica: int) -> None:
        """Let a replica's process have loaded."""
        notes = Notes()
        link = EngineLink(notes, replica)  # type: ignore[arg-type]
        link.is_serving = True
        self.links[replica], self.notes[replica] = link, notes
        self.dispatcher.begin(link, INFO)

    def die(self, replica: int) -> bool:
        """Let a replica's process die without a word; return whether a request was blamed."""
        link = self.links.pop(replica)
        link.is_serving = False
        return self.dispatcher.lost(link, "it was told to")

    def submit(self, seed: int, prompt: list[int] | None = None) -> RequestStream:
        """Let a request arrive."""
        params = SamplingParams(seed=seed, max_tokens=50)
        return self.dispatcher.submit(Arrival(prompt or [seed], params))

    def place(self, stream: RequestStream) -> int | None:
        """Return which living replica has a request; at most one has."""
        places = [replica for replica, link in self.links.items() if link.has(stream.number)]
        assert len(places) <= 1
        return places[0] if places else None

    def speak(self, replica: int, stream: RequestStream, ids: list[int], ends: bool) -> None:
        """Let a replica say some tokens of a request."""
        reason = FinishReason.LENGTH if ends else None
        update = RequestUpdate(Handle(0), [Sample(i) for i in ids], reason)
        self.dispatcher.receive(Updates([(stream.number, update)]), replica)


class ReplicaMachine(RuleBasedStateMachine):
    """Any order of arrivals, tokens, ends, deaths and restarts of three replicas."""

    def __init__(self) -> None:
        super().__init__()
        self.replicas = Replicas()
        self.requests: list[Served] = []

    @rule()
    def submit(self) -> None:
        """A request arrives; whether engines are there or not."""
        self.requests.append(Served(self.replicas.submit(len(self.requests))))

    @rule(replica=st.integers(0, NUM_REPLICAS - 1))
    def load_or_die(self, replica: int) -> None:
        """A process has loaded, or one that had dies."""
        if replica in self.replicas.links:
            self.replicas.die(replica)
        else:
            self.replicas.load(replica)

    @rule(data=st.data(), count=st.integers(1, 3), ends=st.booleans())
    def speak(self, data: st.DataObject, count: int, ends: bool) -> None:
        """A replica says tokens of a request that it has."""
        given = [r for r in self.requests if self.replicas.place(r.stream) is not None]
        if not given:
            return
        served = data.draw(st.sampled_from(given))
        place = self.replicas.place(served.stream)
        assert place is not None
        start = len(served.ids)
        ids = [token(served.stream.number, start + i) for i in range(count)]
        served.ids += ids
        self.replicas.speak(place, served.stream, ids, ends)

    @rule(number=st.integers(0, 20), replica=st.integers(0, NUM_REPLICAS - 1))
    def speak_out_of_turn(self, number: int, replica: int) -> None:
        """What a replica says of a request that it does not have is not heard."""
        if number < len(self.requests) and replica in self.replicas.links:
            stream = self.requests[number].stream
            if self.replicas.place(stream) != replica:
                self.replicas.speak(replica, stream, [999_999], False)

    @rule(number=st.integers(0, 20), finishes=st.booleans())
    def leave(self, number: int, finishes: bool) -> None:
        """A client leaves, or a stop string matched."""
        if number < len(self.requests):
            stream = self.requests[number].stream
            if finishes:
                stream.finish(len(stream.output_token_ids))
            else:
                stream.abort()

    @invariant()
    def check(self) -> None:
        """Ids are those drawn, and whatever may run is with a living replica, whole and once."""
        suspects = self.replicas.dispatcher._suspects
        untried = suspects.untried
        for served in self.requests:
            stream = served.stream
            assert stream.output_token_ids == served.ids
            place = self.replicas.place(stream)
            if stream.is_ended:
                assert place is None
                continue
            may_run = [r for r in self.replicas.links if suspects.may_run(stream.number, r)]
            assert place is not None or not may_run
            assert stream.number not in untried or place is None
        for replica in self.replicas.links:
            adds = [c for c in self.replicas.notes[replica].commands if isinstance(c, Add)]
            assert len({add.number for add in adds}) == len(adds)
            for add in adds:
                ids = list(add.arrival.output_token_ids)
                assert ids == self.requests[add.number].ids[: len(ids)]

    def teardown(self) -> None:
        """When the last replica is given up, every stream has one end and raises why."""
        dispatcher = self.replicas.dispatcher
        for replica in range(NUM_REPLICAS):
            if replica in self.replicas.links:
                self.replicas.die(replica)
            dispatcher.give_up(replica, "over")
        assert len(dispatcher.streams) == 0
        for served in self.requests:
            asyncio.run(read_to_the_end(served))


TestReplicas = ReplicaMachine.TestCase
TestReplicas.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_equal_requests_are_spread_evenly() -> None:
    """As many with each, and one that dies leaves its own to the others, evenly too."""
    replicas = Replicas()
    for replica in range(3):
        replicas.load(replica)
    streams = [replicas.submit(seed) for seed in range(12)]
    places = [replicas.place(stream) for stream in streams]
    assert [places.count(replica) for replica in range(3)] == [4, 4, 4]
    replicas.die(1)
    places = [replicas.place(stream) for stream in streams]
    assert [places.count(replica) for replica in range(3)] == [6, 0, 6]
    replicas.load(1)
    late = [replicas.submit(seed) for seed in range(12, 16)]
    assert {replicas.place(stream) for stream in late} == {1}


def test_choices_are_spread_and_their_prompt_goes_once_to_each_replica() -> None:
    """Twelve choices over three replicas are three messages."""
    replicas = Replicas()
    for replica in range(3):
        replicas.load(replica)
    streams = replicas.dispatcher.submit_choices(
        Arrival([1, 2, 3], SamplingParams(seed=seed, max_tokens=50)) for seed in range(12)
    )
    places = [replicas.place(stream) for stream in streams]
    assert [places.count(replica) for replica in range(3)] == [4, 4, 4]
    for replica, notes in replicas.notes.items():
        (add,) = notes.commands
        assert isinstance(add, Add)
        own = [stream for stream in streams if replicas.place(stream) == replica]
        assert add.numbers == tuple(stream.number for stream in own)
        seeds = [add.arrival.params.seed, *(sibling.seed for sibling in add.siblings)]
        assert seeds == [stream.params.seed for stream in own]


def test_what_moved_goes_on_from_its_ids() -> None:
    """The next replica is told all ids so far; what it says then is counted as its own."""
    replicas = Replicas(2)
    replicas.load(0)
    replicas.load(1)
    stream = replicas.submit(3, [1, 2])
    replicas.speak(0, stream, [7, 8], False)
    replicas.die(0)
    (add,) = replicas.notes[1].commands
    assert isinstance(add, Add)
    assert (list(add.arrival.prompt_token_ids), list(add.arrival.output_token_ids)) == (
        [1, 2],
        [7, 8],
    )
    replicas.speak(1, stream, [9], True)
    assert stream.output_token_ids == [7, 8, 9]
    exported = [metrics.render()[0].decode() for metrics in replicas.dispatcher._metrics]
    for replica, counts in enumerate(((2, 0, 0), (1, 1, 1))):
        labels = f'{{engine="{replica}",model_name="m"}}'
        named = (f"generation_tokens_total{labels}", f"requests_resumed_total{labels}")
        assert f"fastserve:{named[0]} {counts[0]:.1f}" in exported[replica]
        assert f"fastserve:{named[1]} {counts[1]:.1f}" in exported[replica]
        ended = f'request_success_total{{engine="{replica}",finished_reason="length"'
        assert f'{ended},model_name="m"}} {counts[2]:.1f}' in exported[replica]


def test_a_suspect_waits_for_a_new_process_while_others_go_on() -> None:
    """Two replicas died with it; it is tried alone in the first that is back, and is to blame."""
    replicas = Replicas(3)
    for replica in range(3):
        replicas.load(replica)
    poisoned = replicas.submit(0)
    for _ in range(2):
        for seed in range(1, 4):  # beside it, so that nothing is certain yet
            replicas.submit(seed)
        place = replicas.place(poisoned)
        assert place is not None
        assert not replicas.die(place)
    (living,) = replicas.links
    assert replicas.place(poisoned) is None
    bystander = replicas.submit(2)
    assert replicas.place(bystander) == living
    back = min({0, 1, 2} - {living})
    replicas.load(back)
    assert replicas.place(poisoned) == back
    assert replicas.place(replicas.submit(3)) == living, "the trial is held with nobody else"
    assert replicas.die(back)
    assert isinstance(poisoned.error, RequestFailedError)
    assert replicas.dispatcher.num_blamed == 1
    assert not bystander.is_ended


def test_a_suspect_ends_where_no_process_will_begin() -> None:
    """The replica that died with it is given up, and those that live are not risked for it."""
    replicas = Replicas(3)
    for replica in range(3):
        replicas.load(replica)
    poisoned = replicas.submit(0)
    others = []
    dead = []
    for _ in range(2):
        others += [replicas.submit(1) for _ in range(3)]
        place = replicas.place(poisoned)
        assert place is not None
        replicas.die(place)
        dead.append(place)
    suspects = [s for s in [poisoned, *others] if replicas.place(s) is None]
    assert poisoned in suspects
    replicas.dispatcher.give_up(dead[0], "broken")
    assert not poisoned.is_ended, "the other one may come back"
    replicas.dispatcher.give_up(dead[1], "broken")
    assert all(isinstance(stream.error, RequestFailedError) for stream in suspects)
    rest = [stream for stream in others if stream not in suspects]
    assert rest
    assert all(replicas.place(stream) is not None for stream in rest)


def test_requests_end_with_the_last_replica_and_not_before() -> None:
    """One that is given up takes nothing with it."""
    replicas = Replicas(2)
    stream = replicas.submit(0)
    replicas.dispatcher.give_up(0, "no memory")
    assert not stream.is_ended
    replicas.load(1)
    assert replicas.place(stream) == 1
    replicas.die(1)
    replicas.dispatcher.give_up(1, "no memory either")
    with pytest.raises(EngineDeadError, match="no memory either"):
        asyncio.run(anext(stream))


def test_a_conversation_goes_on_where_it_was_answered() -> None:
    """The second turn begins with the first and its answer: one replica has their KV."""
    replicas = Replicas(2)
    replicas.load(0)
    replicas.load(1)
    prompt = list(range(100, 132))
    for turn in range(4):
        stream = replicas.submit(turn, prompt)
        assert replicas.place(stream) == 0
        answer = [token(turn, position) for position in range(8)]
        replicas.speak(0, stream, answer, True)
        prompt = [*prompt, *answer, turn]
    assert stream.number == RequestNumber(3)
