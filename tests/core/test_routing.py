"""The router: least expected work, affinity as work that is saved, and no dead replica, ever."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastserve.core.cost_model import CostModel
from fastserve.core.request import Arrival, SamplingParams
from fastserve.core.routing import Beginnings, ReplicaFacts, Router

COSTS = CostModel(base_s=0.016, prefill_token_s=0.001, decode_seq_s=0.001)
FACTS = ReplicaFacts(
    cost_model=COSTS,
    max_num_seqs=16,
    max_request_tokens=4096,
    block_size=4,
    num_kv_tokens=10**6,
    num_cached_blocks=1000,
)
TOKEN_S = 0.016 / 16 + 0.001  # of one of sixteen


def opened(num_replicas: int, facts: ReplicaFacts = FACTS) -> Router:
    """Return a router with all replicas open."""
    router = Router(num_replicas)
    for replica in range(num_replicas):
        router.open(replica, facts)
    return router


def arrival(num_tokens: int, max_tokens: int = 1, first: int = 0) -> Arrival:
    """Return a request whose prompt is a run of ids from `first` on."""
    return Arrival(range(first, first + num_tokens), SamplingParams(max_tokens=max_tokens))


def test_work_by_hand() -> None:
    """Prompt tokens, and the one token that the limit leaves, each at its price."""
    router = opened(2)
    assert router.route(1, arrival(100)) == 0
    assert router.outstanding_s(0) == pytest.approx(100 * 0.001 + TOKEN_S)
    assert router.outstanding_s(1) == 0.0


def test_the_least_work_gets_the_next() -> None:
    """A long prompt on one replica, short ones on the other until both have as much."""
    router = opened(2)
    places = [router.route(0, arrival(350))]
    places += [router.route(n, arrival(100, first=1000 * n)) for n in range(1, 6)]
    assert places == [0, 1, 1, 1, 1, 0]


def test_idle_replicas_take_turns() -> None:
    """Equal ones get equally many, whichever is first in the list."""
    router = opened(3)
    places = []
    for number in range(12):
        places.append(router.route(number, arrival(10, first=100 * number)))
        router.ended(number, 1)
    assert [places.count(replica) for replica in range(3)] == [4, 4, 4]


def test_a_slower_replica_gets_less() -> None:
    """Work is in seconds of the machine that would do it."""
    router = opened(2)
    slow = CostModel(base_s=0.048, prefill_token_s=0.003, decode_seq_s=0.003)
    router.open(1, dataclasses.replace(FACTS, cost_model=slow))
    places = [router.route(n, arrival(100, first=1000 * n)) for n in range(40)]
    assert 29 <= places.count(0) <= 31


def test_a_known_beginning_is_worth_the_prefill_it_saves() -> None:
    """The replica that has it is chosen until what waits there is more than the saving."""
    router = opened(2)
    shared = arrival(400)
    assert router.route(0, shared) == 0
    router.ended(0, 1)
    # 400 tokens are full blocks; the last token is computed in any case.
    assert router.route(1, shared) == 0
    assert router.outstanding_s(0) == pytest.approx(1 * 0.001 + TOKEN_S)
    router.ended(1, 1)
    assert router.route(2, arrival(398, first=10_000)) == 1
    router.ended(2, 1)
    assert router.route(3, arrival(395, first=20_000), among={0}) == 0
    assert router.route(4, shared) == 0, "395 ms wait there, and 399 ms are saved"
    assert router.route(5, shared) == 1


def test_an_answer_is_a_beginning_too() -> None:
    """The next turn of a conversation goes where the one before it was answered."""
    router = opened(2)
    router.route(0, arrival(8, first=500), among={1})
    router.ended(0, 8, range(508, 516))
    assert router.route(1, arrival(16, first=500)) == 1
    assert router.outstanding_s(1) == pytest.approx(1 * 0.001 + TOKEN_S)


def test_salts_share_nothing() -> None:
    """Equal ids under another salt are another beginning."""
    router = opened(2)
    salted = dataclasses.replace(arrival(400), cache_salt="a")
    router.route(0, salted, among={1})
    router.ended(0, 1)
    assert router.route(1, salted) == 1
    router.ended(1, 1)
    router.route(2, arrival(400), among={1})
    assert router.outstanding_s(1) == pytest.approx(400 * 0.001 + TOKEN_S)


def test_where_no_prefix_is_shared_there_is_no_affinity() -> None:
    """The same prompts take turns."""
    router = opened(2, dataclasses.replace(FACTS, num_cached_blocks=0))
    places = []
    for number in range(6):
        places.append(router.route(number, arrival(400)))
        router.ended(number, 1)
    assert [places.count(replica) for replica in range(2)] == [3, 3]


def test_expected_work_follows_the_answers_that_ended() -> None:
    """After many answers of 8 tokens, a request is expected to be about as long."""
    router = opened(2)
    for number in range(200):
        router.route(number, arrival(16, max_tokens=2000, first=100 * number))
        router.ended(number, 8)
    router.route(1000, arrival(16, max_tokens=2000, first=10**6), among={0})
    learned_s = router.outstanding_s(0)
    assert 0.016 + 7 * TOKEN_S < learned_s < 0.016 + 40 * TOKEN_S
    fresh = opened(2)
    fresh.route(0, arrival(16, max_tokens=2000))
    assert fresh.outstanding_s(0) > 5 * learned_s


def test_work_falls_as_tokens_come() -> None:
    """The first token ends the prefill; near the limit there is next to nothing left."""
    router = opened(2)
    router.route(0, arrival(100, max_tokens=64))
    seen = [router.outstanding_s(0)]
    for num_tokens in range(1, 64):
        router.grew(0, num_tokens)
        seen.append(router.outstanding_s(0))
    assert seen[0] - seen[1] >= 0.1 - 1e-9
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(seen))
    assert seen[-1] <= 12 * TOKEN_S, "the last bin is twelve tokens wide"


def test_what_goes_on_elsewhere_is_prefilled_anew() -> None:
    """Prompt and ids so far are computed again, and only the rest of the answer is expected."""
    router = opened(2)
    whole = arrival(100, max_tokens=40)
    router.route(0, whole)
    router.grew(0, 30)
    router.close(0)
    assert router.outstanding_s(0) == 0.0
    moved = dataclasses.replace(whole, output_token_ids=tuple(range(30)))
    assert router.route(0, moved) == 1
    assert 0.130 < router.outstanding_s(1) < 0.130 + 13 * TOKEN_S


def test_a_single_replica_keeps_nothing() -> None:
    """There is nothing to choose, and no account of it."""
    router = opened(1)
    assert router.route(0, arrival(100)) == 0
    assert router.outstanding_s(0) == 0.0
    router.grew(0, 3)
    router.ended(0, 3)
    router.close(0)
    assert router.route(1, arrival(100)) is None


def test_the_oldest_beginnings_go_first_and_their_ends_before_them() -> None:
    """As in the pool: what a chain begins with is of use to more prompts than its end."""
    beginnings = Beginnings(4)
    chain = [bytes([index]) for index in range(3)]
    beginnings.add(chain)
    beginnings.add([b"x", b"y"])
    assert beginnings.num_known(chain) == 2
    assert beginnings.num_known([b"x", b"y", b"z"]) == 2
    assert len(beginnings) == 4


@given(
    works=st.lists(st.integers(1, 400), min_size=1, max_size=12),
    num_replicas=st.integers(2, 5),
)
def test_no_replica_is_idle_while_two_wait_at_another(works: list[int], num_replicas: int) -> None:
    """Without shared prefixes: an idle replica is chosen before any that has work."""
    router = opened(num_replicas)
    used: set[int] = set()
    for number, num_tokens in enumerate(works):
        place = router.route(number, arrival(num_tokens, first=1000 * number))
        assert place is not None
        assert (place not in used) == (len(used) < num_replicas)
        used.add(place)


class RouterMachine(RuleBasedStateMachine):
    """Any order of arrivals, tokens, ends, openings and closings."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(3)
        self.open: set[int] = set()
        self.places: dict[int, int] = {}
        self.num_requests = 0

    @rule(replica=st.integers(0, 2))
    def opens(self, replica: int) -> None:
        """A replica is there, perhaps in the place of one that was."""
        self.router.open(replica, FACTS)
        self.open.add(replica)
        self.places = {n: place for n, place in self.places.items() if place != replica}

    @rule(replica=st.integers(0, 2))
    def closes(self, replica: int) -> None:
        """A replica dies, if it was there."""
        self.router.close(replica)
        self.open.discard(replica)
        self.places = {n: place for n, place in self.places.items() if place != replica}

    @rule(
        num_tokens=st.integers(0, 60),
        first=st.sampled_from([0, 30, 1000]),
        limit=st.sampled_from([None, 1, 40]),
        among=st.none() | st.sets(st.integers(0, 2)),
    )
    def routes(self, num_tokens: int, first: int, limit: int | None, among: set[int] | None):
        """A request goes to an open replica, or nowhere where there is none."""
        request = Arrival(range(first, first + num_tokens), SamplingParams(max_tokens=limit))
        allowed = self.open if among is None else self.open & among
        place = self.router.route(self.num_requests, request, among)
        assert (place is None) == (not allowed)
        if place is not None:
            assert place in allowed
            self.places[self.num_requests] = place
        self.num_requests += 1

    @precondition(lambda self: self.places)
    @rule(data=st.data(), num_tokens=st.integers(1, 50))
    def grows(self, data: st.DataObject, num_tokens: int) -> None:
        """Tokens of an answer come."""
        self.router.grew(data.draw(st.sampled_from(sorted(self.places))), num_tokens)

    @precondition(lambda self: self.places)
    @rule(data=st.data(), num_tokens=st.integers(0, 50), fails=st.booleans())
    def ends(self, data: st.DataObject, num_tokens: int, fails: bool) -> None:
        """An answer ends, or its request fails; a second end is none."""
        number = data.draw(st.sampled_from(sorted(self.places)))
        for _ in range(2):
            if fails:
                self.router.failed(number)
            else:
                self.router.ended(number, num_tokens, range(num_tokens))
        del self.places[number]

    @invariant()
    def conserves_work(self) -> None:
        """A replica has the work of its requests, no more and no less; an idle one has none."""
        for replica in range(3):
            mine = [n for n, place in self.places.items() if place == replica]
            works = [self.router._placed[number].work_s for number in mine]
            assert all(work_s > 0.0 for work_s in works)
            assert self.router.outstanding_s(replica) == pytest.approx(sum(works), abs=1e-9)
            if not mine:
                assert self.router.outstanding_s(replica) == 0.0
        assert set(self.router._placed) == set(self.places)


TestRouter = RouterMachine.TestCase
TestRouter.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
