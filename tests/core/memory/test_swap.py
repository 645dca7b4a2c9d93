"""Claims on two tiers, step by step: each test is named for a fault that an engine has had."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastserve.core.build import build_cache
from fastserve.core.memory.block import State
from fastserve.core.memory.memory import Claim, KVCacheManager
from fastserve.core.memory.swap import EXCHANGE_SHARE
from fastserve.core.memory.table import BlockTable
from fastserve.core.messages import Copy, CopyDirection
from fastserve.core.policies.fcfs import FCFS
from fastserve.core.policies.protocol import Coldness
from fastserve.core.request import Arrival, Handle, Request, SamplingParams
from tests.core.harness import UNIT_COST, small_config

BLOCK_SIZE = 4
OUT, IN = CopyDirection.SWAP_OUT, CopyDirection.SWAP_IN
# A block is copied sooner than computed.
COSTS = replace(UNIT_COST, prefill_token_s=0.2, copy_block_s=0.01)


class Room:
    """KV memory that is first come first served, and the copies it has begun."""

    def __init__(
        self, num_device: int, num_host: int, mode: str = "reactive", policy: FCFS | None = None
    ) -> None:
        config = small_config(preemption_mode=mode, enable_prefix_caching=True)
        self.cache: KVCacheManager = build_cache(
            config, COSTS, policy or FCFS(), num_device, num_host
        )
        self.requests: list[Request] = []

    def request(self, num_tokens: int, *, shared: int = 0) -> Request:
        """Return a new request; its first ids may be those that all others have."""
        own = 1000 * (len(self.requests) + 1)
        ids = [p if p < shared else own + p for p in range(num_tokens)]
        arrival = Arrival(ids, SamplingParams())
        request = Request(Handle(len(self.requests)), arrival, max_output_tokens=8)
        self.requests.append(request)
        return request

    def claim(
        self,
        request: Request,
        *,
        after: tuple[int, ...] = (),
        now: float = 0.0,
        is_patient: bool = False,
    ) -> Claim:
        """Claim all that a request needs, as the head of the order or behind others."""
        if not after:
            self.cache.begin_plan(now)
        scanned = {request.handle, *after}
        outcome = self.cache.claim(request, request.num_tokens, scanned, is_patient=is_patient)
        self.cache.check(self.requests)
        return outcome

    def compute(self, num_tokens: int, *, shared: int = 0) -> tuple[Request, BlockTable]:
        """Return a new request all of whose ids have KV on the device."""
        request = self.request(num_tokens, shared=shared)
        assert self.claim(request) is Claim.MET
        table = request.table
        assert table is not None
        request.num_scheduled_tokens = request.max_computed_tokens = num_tokens
        self.cache.advance(request, table, num_tokens)
        return request, table

    def end(self, request: Request) -> None:
        """End a request."""
        self.cache.release(request)
        self.cache.check(self.requests)

    def begun(self) -> tuple[Copy, ...]:
        """Return the copies that are to begin."""
        return self.cache.copies(0.0)

    def report(self, *copies: Copy, has_failed: bool = False) -> None:
        """Report copies as done."""
        for copy in copies:
            self.cache.copied(copy.copy_id, has_failed=has_failed)
        self.cache.check(self.requests)

    def run(self, head: Request) -> None:
        """Plan until the claim of the head of the order is met, each copy done at once."""
        while self.claim(head) is not Claim.MET:
            copies = self.begun()
            assert copies, "nothing can run and nothing is in flight"
            self.report(*copies)

    def swap_out(self, request: Request) -> None:
        """Have a head that needs the whole device take it, and go again."""
        taker = self.request(self.cache.pool.num_device_blocks * BLOCK_SIZE)
        self.run(taker)
        assert states(request) == {State.HOST}
        self.end(taker)


def states(request: Request) -> set[State]:
    """Return the states of the Blocks of a request."""
    assert request.table is not None
    return {block.state for block in request.table.blocks}


def test_a_store_is_not_begun_before_the_step_that_writes_the_block_has_landed() -> None:
    """What a step in flight is about to write may not leave with what was there before."""
    room = Room(4, 8)
    victim, table = room.compute(12)
    table.steps_in_flight = 1
    head = room.request(8)
    assert room.claim(head) is Claim.STANDS
    assert room.begun() == ()
    assert table.is_on_device
    table.steps_in_flight = 0
    room.cache.landed(table)
    assert room.claim(head) is Claim.STANDS
    (copy,) = room.begun()
    assert copy.direction is OUT
    assert set(copy.src) <= {block.device_id for block in table.blocks}
    room.report(copy)
    assert room.claim(head) is Claim.MET
    assert State.HOST in states(victim)


def test_a_load_overwrites_nothing_that_the_last_step_still_reads() -> None:
    """The request has ended, its step has not: a load gets other places or waits."""
    room = Room(4, 8)
    away, _ = room.compute(12)
    room.swap_out(away)
    _, read = room.compute(12)
    places = {block.device_id for block in read.blocks}
    read.steps_in_flight = 1
    room.end(room.requests[-1])
    assert room.claim(away) is Claim.STANDS
    first = room.begun()
    assert [len(copy.dst) for copy in first] == [1]
    assert not places & set(first[0].dst)
    assert room.claim(away) is Claim.STANDS
    assert room.begun() == ()
    read.steps_in_flight = 0
    room.cache.landed(read)
    assert room.claim(away) is Claim.STANDS
    second = room.begun()
    assert [len(copy.dst) for copy in second] == [2]
    room.report(*second, *first)
    assert room.claim(away) is Claim.MET


def test_of_two_that_hold_loaded_blocks_and_do_not_both_fit_one_runs() -> None:
    """The first of the order takes back what was loaded for the other; it is CLEAN, and goes."""
    room = Room(4, 12)
    first, _ = room.compute(12)
    room.swap_out(first)
    second, table = room.compute(12)
    room.swap_out(second)
    assert room.claim(second) is Claim.STANDS
    room.report(*room.begun())
    assert table.is_on_device
    room.run(first)
    assert State.HOST in states(second)
    assert room.claim(second, after=(first.handle,)) is not Claim.MET
    room.end(first)
    room.run(second)
    assert room.cache.moves.num_swapped_in_blocks >= 6


@pytest.mark.parametrize("has_failed", [False, True])
def test_a_request_comes_back_while_its_store_is_in_flight(has_failed: bool) -> None:
    """Its blocks stay: nothing is loaded, and nothing runs before the copy is reported."""
    room = Room(4, 8)
    victim, table = room.compute(10)
    head = room.request(8)
    assert room.claim(head) is Claim.STANDS
    (store,) = room.begun()
    room.end(head)
    places = [block.device_id for block in table.blocks]
    assert room.claim(victim) is Claim.STANDS, "its tail would be written under the copy"
    assert room.begun() == ()
    room.report(store, has_failed=has_failed)
    assert room.claim(victim) is Claim.MET
    assert [block.device_id for block in table.blocks] == places
    assert table.blocks[-1].state is State.DIRTY, "the host's copy of what changes is kept"
    assert room.cache.moves.num_swapped_in_blocks == 0


def prefix_on_host(room: Room) -> None:
    """Have two full blocks of a beginning on the host alone, named by nobody."""
    first, table = room.compute(9, shared=8)
    for block in table.blocks[:2]:
        room.cache.pool.save(block)
        room.cache.pool.saved(block)
    room.end(first)
    taker, _ = room.compute(room.cache.pool.num_device_blocks * BLOCK_SIZE)
    room.end(taker)
    assert [block.state for block in room.cache.pool._saved] == [State.HOST] * 2


def test_a_hit_that_is_evicted_before_its_use_is_no_hit() -> None:
    """To make room for it, the victim's KV takes the host places of what was found."""
    room = Room(4, 2)
    prefix_on_host(room)
    room.compute(16)
    late = room.request(12, shared=8)
    assert room.cache.probe(late) == 8
    room.run(late)
    assert late.table is not None
    assert states(late) == {State.DIRTY}
    assert late.num_computed_tokens == 0, "it goes on from KV that is gone"
    assert room.cache.moves.num_swapped_in_blocks == 0


@pytest.mark.parametrize("has_failed", [False, True])
def test_one_load_serves_all_that_share_a_prefix(has_failed: bool) -> None:
    """The second does not queue a load of its own, nor behind the first one's end."""
    room = Room(8, 8)
    prefix_on_host(room)
    twins = [room.request(12, shared=8), room.request(12, shared=8)]
    assert room.claim(twins[0]) is Claim.STANDS
    assert room.claim(twins[1], after=(twins[0].handle,)) is Claim.STANDS
    (load,) = room.begun()
    assert (load.direction, len(load.src)) == (IN, 2)
    room.report(load, has_failed=has_failed)
    assert room.claim(twins[0]) is Claim.MET
    assert room.claim(twins[1], after=(twins[0].handle,)) is Claim.MET
    assert room.begun() == ()
    expected = (0, 1) if has_failed else (8, 0)
    assert [(twin.num_computed_tokens, twin.epoch) for twin in twins] == [expected] * 2


def test_a_host_place_is_not_freed_while_its_copy_runs() -> None:
    """The request that was on its way out is aborted; another's store gets other places."""
    room = Room(4, 8)
    victim, _ = room.compute(16)
    head = room.request(16)
    assert room.claim(head) is Claim.STANDS
    (store,) = room.begun()
    assert store.direction is OUT
    room.end(victim)
    pool = room.cache.pool
    assert (pool.num_host_moving, pool.num_available) == (len(store.dst), 4 - len(store.src))
    assert room.claim(head) is Claim.STANDS, "it gets a place that a copy reads"
    others = [room.cache.pool._host.take() for _ in range(pool.num_host_free)]
    assert not set(others) & set(store.dst)
    for place in others:
        room.cache.pool._host.give_back(place)
    room.report(store)
    assert room.claim(head) is Claim.MET


def test_a_store_that_failed_is_not_found() -> None:
    """The copy on the device is; when its place is taken, nothing is left."""
    room = Room(4, 8)
    victim, _ = room.compute(9, shared=8)
    head = room.request(16)
    assert room.claim(head) is Claim.STANDS
    room.report(*room.begun(), has_failed=True)
    assert states(victim) == {State.DIRTY}
    twin = room.request(12, shared=8)
    assert room.cache.probe(twin) == 8
    assert room.claim(head) is Claim.MET
    assert room.cache.probe(twin) == 0
    assert victim.epoch == 1


def test_write_through_that_has_not_finished_gives_no_place() -> None:
    """The copy under way is waited for, not begun again, and not taken as done."""
    room = Room(4, 8, "proactive")
    victim, table = room.compute(16)
    (save,) = room.begun()
    assert states(victim) == {State.SAVING}
    head = room.request(8)
    assert room.claim(head) is Claim.STANDS
    assert room.begun() == ()
    assert [block.state for block in table.blocks].count(State.LEAVING) == 2
    room.report(save)
    assert room.claim(head) is Claim.MET
    assert room.begun() == ()
    assert [block.state for block in table.blocks].count(State.CLEAN) == 2


def test_a_victim_passed_over_for_what_it_shares_is_asked_again() -> None:
    """Another wants all it has; when that one is dropped in the same claim, it can give way."""
    room = Room(8, 2)
    first, _ = room.compute(17, shared=16)
    second, table = room.compute(24, shared=16)
    small = room.request(12)
    room.run(small)
    room.end(small)
    assert [block.state for block in table.blocks] == [State.DIRTY] * 4 + [State.HOST] * 2
    assert room.cache.pool.num_host_available == 0
    room.run(room.request(32))
    assert (first.epoch, second.epoch) == (1, 1)


class OldestGoes(FCFS):
    """First come, first to lose its KV."""

    def coldness(self, request: Request, now: float) -> Coldness:
        """Return the age."""
        return (-request.handle,)


@pytest.mark.parametrize("num_device", [4, 6])
def test_over_a_broken_link_the_head_still_runs(num_device: int) -> None:
    """A request that could not leave once is dropped the next time."""
    room = Room(num_device, 8)
    victim, _ = room.compute(16)
    head = room.request(4 * num_device)
    assert room.claim(head) is Claim.STANDS
    room.report(*room.begun(), has_failed=True)
    assert room.claim(head) is Claim.MET
    assert (victim.epoch, room.cache.moves.num_failed_copies) == (1, 1)


def test_one_that_could_not_leave_is_dropped_though_another_copy_of_it_is_under_way() -> None:
    """Else there is always one more copy to wait for, and over a broken link for ever."""
    room = Room(20, 40)
    victim, table = room.compute(80)
    assert room.claim(room.request(4)) is Claim.STANDS
    (first,) = room.begun()
    room.end(room.requests[-1])
    head = room.request(60)
    assert room.claim(head) is Claim.STANDS
    (second,) = room.begun()
    room.report(first, has_failed=True)
    assert {block.state for block in table.blocks} == {State.DIRTY, State.LEAVING}
    room.end(head)
    assert room.claim(victim) is Claim.MET
    assert State.SAVING in states(victim)
    room.claim(room.request(60))
    assert (victim.epoch, room.begun()) == (1, ())
    room.report(second, has_failed=True)


def test_what_does_not_fit_is_not_fetched_again_and_again() -> None:
    """A table of which less is fetched at a time than it has is fetched no more than once."""
    room = Room(4, 12, "proactive", OldestGoes())
    away, table = room.compute(16)
    room.swap_out(away)
    room.compute(8)
    for _ in range(6):
        for _ in range(60):  # nothing is taken for long enough to be expected no more
            room.cache.begin_plan(0.0)
        for _ in range(2):  # what the cache of prefixes gained is saved first
            room.report(*room.begun())
        taker, _ = room.compute(8)
        room.end(taker)
    assert 0 < room.cache.moves.num_fetched_blocks <= len(table.blocks)


# ── who gives way first, and when one that gave way comes back ───────────────────────────────


def save_all(table: BlockTable, room: Room) -> None:
    """Have all full Blocks of a table on both tiers."""
    for block in table.blocks:
        room.cache.pool.save(block)
        room.cache.pool.saved(block)


def test_what_is_left_of_one_that_gave_way_is_taken_first_and_by_any() -> None:
    """No step uses it, so that it goes before what the coldest runs on, and to a colder one."""
    room = Room(6, 8, policy=OldestGoes())
    oldest, _ = room.compute(8)
    left, table = room.compute(12)
    save_all(table, room)
    head = room.request(12)
    assert room.claim(head, after=(oldest.handle,)) is Claim.MET
    on_both = [block.state for block in table.blocks].count(State.CLEAN)
    assert (on_both, room.cache.pool.num_unwanted) == (1, 1)
    outcome = room.cache.claim(oldest, 12, {head.handle, oldest.handle})
    assert outcome is Claim.MET, "it is the coldest, and stands still beside what nobody uses"
    assert (states(left), room.cache.pool.num_unwanted) == ({State.HOST}, 0)
    room.cache.check(room.requests)


def gone(room: Room) -> tuple[Request, float]:
    """Return a request all of whose KV is on the host, and how long it is to stay away."""
    away, table = room.compute(12)
    room.swap_out(away)
    assert room.cache._swapper is not None
    return away, room.cache._swapper.wait_s(len(table.blocks))


@pytest.mark.parametrize("share", [0.0, 0.99, 1.01])
def test_the_places_of_others_are_taken_back_only_after_a_wait(share: float) -> None:
    """Before, the claim is as if it had not been made, unless nothing else can run."""
    room = Room(4, 8)
    away, wait_s = gone(room)
    other, _ = room.compute(12)
    now = away.last_ran_at + share * wait_s
    assert room.claim(away, now=now, is_patient=True) is (
        Claim.STANDS if share > 1.0 else Claim.DEFERRED
    )
    assert (states(other) == {State.DIRTY}) == (share < 1.0)
    assert bool(room.begun()) == (share > 1.0)
    assert room.cache.num_left == room.cache.pool.num_available or share > 1.0
    assert room.claim(away, now=now) is Claim.STANDS
    assert room.begun() or share > 1.0


def test_unused_places_are_taken_back_at_once() -> None:
    """What is free, and what is left of another that gave way: nobody runs on it."""
    room = Room(8, 16)
    away, _ = gone(room)
    other, table = room.compute(16)
    save_all(table, room)
    for _ in range(60):  # nothing is taken for long enough to be expected no more
        room.cache.begin_plan(0.0)
    assert room.claim(away, is_patient=True) is Claim.STANDS
    (load,) = room.begun()
    assert (load.direction, len(load.dst)) == (IN, 3)
    assert states(other) == {State.CLEAN}
    room.report(load)
    assert room.claim(away, is_patient=True) is Claim.MET


def test_the_wait_grows_with_what_is_away_and_with_what_is_lacking() -> None:
    """If all that is away came back as often, the same share of the device would lie idle."""
    room = Room(16, 64)
    _, wait_s = gone(room)
    swapper, pool = room.cache._swapper, room.cache.pool
    assert swapper is not None
    assert pool.num_away == 3
    assert swapper.wait_s(6) > wait_s
    gone(room)
    assert pool.num_away == 6
    assert swapper.wait_s(3) == pytest.approx(2.0 * wait_s)
    idle_s = COSTS.copy_s(3) + COSTS.min_iteration_s
    share = pool.num_away * idle_s / (pool.num_device_blocks * swapper.wait_s(3))
    assert share == pytest.approx(EXCHANGE_SHARE)


def test_over_a_link_that_takes_no_time_nobody_waits() -> None:
    """What costs nothing is not put off."""
    room = Room(4, 8, "ideal")
    _, wait_s = gone(room)
    assert wait_s == 0.0


def test_while_a_copy_is_on_its_way_what_nobody_uses_is_taken_instead() -> None:
    """The claim is met at once, and the place that the copy will free is another's."""
    room = Room(8, 16, policy=OldestGoes())
    _, dirty = room.compute(12)
    _, clean = room.compute(12)
    save_all(clean, room)
    head = room.request(20)
    assert room.claim(head) is Claim.STANDS
    assert [block.state for block in dirty.blocks] == [State.LEAVING] * 3
    assert [block.state for block in clean.blocks] == [State.CLEAN] * 3
    room.cache._give_way(room.requests[1], 0)
    assert room.claim(head) is Claim.MET
    assert [block.state for block in clean.blocks] == [State.HOST] * 3
