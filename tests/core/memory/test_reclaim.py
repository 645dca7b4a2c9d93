"""Reclaiming: who gives way, and how, where a claim is short; each test is named for a fault."""

from __future__ import annotations

import pytest

from fastserve.core.memory.block import State
from fastserve.core.memory.claim import Claim
from tests.core.memory.two_tiers import OldestGoes, Room, save_all, states


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
    room.cache._reclaimer.give_way(room.requests[1], 0)
    assert room.claim(head) is Claim.MET
    assert [block.state for block in clean.blocks] == [State.HOST] * 3
