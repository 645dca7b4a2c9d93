"""Claims step by step: what they leave untouched, and how KV that is away comes back."""

from __future__ import annotations

import pytest

from fastserve.core.memory.block import State
from fastserve.core.memory.claim import Claim
from tests.core.memory.caches import compute, make_cache, make_request
from tests.core.memory.two_tiers import BLOCK_SIZE, IN, Room, gone, save_all, states


def test_what_a_request_finds_is_not_given_up_to_make_room_for_it() -> None:
    """Cached blocks that it begins with are no places for the rest of it: its claim stands."""
    cache = make_cache(4)
    first = make_request(0, list(range(9)))
    compute(cache, first, 8)
    cache.release(first)
    other = make_request(1, list(range(100, 108)))
    compute(cache, other, 8)
    assert (cache.pool.device.num_free, cache.pool.device.num_cached) == (0, 2)
    again = make_request(2, list(range(9)))
    assert cache.claim(again, 9, {1, 2}) is Claim.STANDS
    assert cache.probe(again) == 8
    cache.release(other)
    cache.begin_plan(1.0)
    assert cache.claim(again, 9, {2}) is Claim.MET
    assert again.num_computed_tokens == 8
    cache.check([again])


# ── what is on the host ─────────────────────────────────────────────────────────────────────


def prefix_on_host(room: Room) -> None:
    """Have two full blocks of a beginning on the host alone, named by nobody."""
    first, table = room.compute(9, shared=8)
    for block in table.blocks[:2]:
        room.cache.pool.save(block)
        room.cache.pool.saved(block)
    room.end(first)
    taker, _ = room.compute(room.cache.pool.device.num_blocks * BLOCK_SIZE)
    room.end(taker)
    assert [block.state for block in room.cache.pool.host.kept()] == [State.HOST] * 2


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
    assert room.cache.num_left == room.cache.pool.device.num_available or share > 1.0
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
