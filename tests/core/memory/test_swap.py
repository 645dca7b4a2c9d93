"""What moves between the tiers, and when: each test is named for a fault that an engine has had."""

from __future__ import annotations

import pytest

from fastserve.core.memory.block import State
from fastserve.core.memory.claim import Claim
from fastserve.core.memory.swap import EXCHANGE_SHARE
from tests.core.memory.two_tiers import COSTS, OUT, OldestGoes, Room, gone, states


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
    assert (pool.host.num_moving, pool.device.num_available) == (len(store.dst), 4 - len(store.src))
    assert room.claim(head) is Claim.STANDS, "it gets a place that a copy reads"
    others = [pool.host.take() for _ in range(pool.host.num_free)]
    assert not set(others) & set(store.dst)
    for place in others:
        pool.host.give_back(place)
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
    share = pool.num_away * idle_s / (pool.device.num_blocks * swapper.wait_s(3))
    assert share == pytest.approx(EXCHANGE_SHARE)


def test_over_a_link_that_takes_no_time_nobody_waits() -> None:
    """What costs nothing is not put off."""
    room = Room(4, 8, "ideal")
    _, wait_s = gone(room)
    assert wait_s == 0.0
