"""BlockPool against a model made of sets and lists, on one tier and on two."""

from __future__ import annotations

from typing import NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fastserve.core.memory.block import NO_PLACE, ON_DEVICE, Block, State
from fastserve.core.memory.pool import BlockPool
from tests.core.memory.blocks import saved, taken

HASHES = [bytes([number]) for number in range(8)]
DEVICE_STATES = {State.DIRTY, State.SAVING, State.LEAVING, State.CLEAN, State.LOADING}
HOST_STATES = {State.SAVING, State.LEAVING, State.CLEAN, State.HOST, State.LOADING}


class Copying(NamedTuple):
    """A copy under way; of one Block, for the pool knows no other."""

    block: Block
    is_out: bool


class Model:
    """A pool, and naive accounts of the same Blocks."""

    def __init__(self, num_device: int, num_host: int) -> None:
        self.pool = BlockPool(num_device, num_host)
        self.names: list[Block] = []  # one entry per name; a Block may have several
        self.wants: list[Block] = []  # the same of the names that want it
        self.copies: list[Copying] = []
        self.states: dict[Block, State] = {}  # of all that is anywhere
        self.findable: dict[bytes, Block] = {}
        # What no table names, least recently used first, on each tier.
        self.device_lru: list[Block] = []
        self.host_lru: list[Block] = []
        self.saved_lru: list[Block] = []  # named and CLEAN, in the order of their saves

    # ── what the pool is asked to do ─────────────────────────────────────────────────────────

    def take(self, number: int) -> None:
        """A table begins or grows."""
        if not self.pool.device.num_available:
            return
        self.expect_device_place()
        block = self.pool.take()
        assert (block.refs, block.wanted, block.hash) == (1, 1, None)
        assert block.state is State.DIRTY
        self.wants.append(block)
        self.names.append(block)
        self.states[block] = State.DIRTY

    def publish(self, number: int) -> None:
        """The ids of a Block are known."""
        block = self.pick(self.names, number)
        if block is None:
            return
        block_hash = HASHES[number % len(HASHES)]
        is_new = block.hash is None and block_hash not in self.findable
        self.pool.publish(block, block_hash)
        if is_new:
            self.findable[block_hash] = block
        assert (self.findable.get(block_hash) is block) == (block.hash == block_hash)

    def unpublish(self, number: int) -> None:
        """A content is not to be trusted."""
        block = self.findable.pop(HASHES[number % len(HASHES)], None)
        self.pool.unpublish(HASHES[number % len(HASHES)])
        if block is None:
            return
        assert block.hash is None
        is_copied = block in [copying.block for copying in self.copies]
        if block not in self.names and not is_copied:
            self.forget(block)

    def retain(self, number: int) -> None:
        """A table finds its beginning, on whichever tier."""
        block = self.pool.find(HASHES[number % len(HASHES)])
        if block is None:
            return
        self.pool.retain(block)
        if block in self.host_lru and self.states[block] is State.CLEAN:
            self.saved_lru.append(block)
        self.unlist(block, named=True)
        self.names.append(block)

    def release(self, number: int) -> None:
        """A table lets go of a Block."""
        block = self.pick(self.names, number)
        if block is None:
            return
        if self.wants.count(block) == self.names.count(block):
            self.wants.remove(block)
            self.pool.unwant(block)
        self.names.remove(block)
        self.pool.release(block)
        if block not in self.names:
            self.saved_lru = [other for other in self.saved_lru if other is not block]
            self.settle(block)

    def want(self, number: int) -> None:
        """A table that names a Block is to run."""
        block = self.pick([b for b in self.names if b.wanted < b.refs], number)
        if block is not None:
            self.wants.append(block)
            self.pool.want(block)

    def unwant(self, number: int) -> None:
        """And gives way."""
        block = self.pick(self.wants, number)
        if block is not None:
            self.wants.remove(block)
            self.pool.unwant(block)

    def save(self, number: int) -> None:
        """A copy ahead of need, of what a table names or of the oldest in the prefix cache."""
        cached = list(self.pool.unsaved())
        assert cached == [b for b in self.device_lru if self.states[b] is State.DIRTY]
        dirty = [b for b in self.names if self.states[b] is State.DIRTY]
        block = self.pick(cached[:1] if number % 2 else dirty, number)
        if block is None or not self.pool.num_host_available:
            return
        self.unlist(block)
        self.states[block] = State.SAVING
        self.expect_host_place()
        self.pool.save(block)
        self.copies.append(Copying(block, is_out=True))

    def leave(self, number: int) -> None:
        """The place on the device of a Block that a table names is needed."""
        state = (State.DIRTY, State.SAVING)[number % 2]
        block = self.pick([b for b in self.names if self.states[b] is state], number)
        if block is None or (state is State.DIRTY and not self.pool.num_host_available):
            return
        self.states[block] = State.LEAVING
        if state is State.DIRTY:
            self.expect_host_place()
        begins = self.pool.leave(block)
        assert begins == (state is State.DIRTY), "a Block is copied twice at a time"
        if begins:
            self.copies.append(Copying(block, is_out=True))

    def stay(self, number: int) -> None:
        """It is needed no more."""
        block = self.pick([b for b in self.names if self.states[b] is State.LEAVING], number)
        if block is not None:
            self.pool.stay(block)
            self.states[block] = State.SAVING

    def drop(self, number: int) -> None:
        """A Block that is on both tiers leaves the device."""
        block = self.pick([b for b in self.names if self.states[b] is State.CLEAN], number)
        if block is not None:
            num_free = self.pool.device.num_free
            self.pool.drop(block)
            assert self.pool.device.num_free == num_free + 1
            self.states[block] = State.HOST
            self.saved_lru.remove(block)

    def load(self, number: int) -> None:
        """A Block that a table names comes back."""
        block = self.pick([b for b in self.names if self.states[b] is State.HOST], number)
        if block is None or not self.pool.device.num_available:
            return
        self.states[block] = State.LOADING
        self.expect_device_place()
        self.pool.load(block)
        self.copies.append(Copying(block, is_out=False))

    def forget_host(self, number: int) -> None:
        """A Block is about to be written."""
        block = self.pick([b for b in self.names if self.states[b] is State.CLEAN], number)
        if block is not None:
            self.pool.forget_host(block)
            self.states[block] = State.DIRTY
            self.saved_lru.remove(block)

    def end(self, number: int) -> None:
        """A copy is done, whichever of those under way; some fail."""
        if not self.copies:
            return
        block, is_out = self.copies.pop(number % len(self.copies))
        has_failed = number % 3 == 0
        state = self.states[block]
        if is_out:
            (self.pool.save_failed if has_failed else self.pool.saved)(block)
            is_leaving = state is State.LEAVING
            done = State.HOST if is_leaving else State.CLEAN
            self.states[block] = State.DIRTY if has_failed else done
        elif has_failed:
            self.pool.load_failed(block)
            self.states[block] = State.GONE
            self.forget(block)
            return
        else:
            self.pool.loaded(block)
            self.states[block] = State.CLEAN
        if block in self.names:
            self.saved_lru += [block] if self.states[block] is State.CLEAN else []
        else:
            self.settle(block, is_old=is_out)

    # ── what is expected of it ───────────────────────────────────────────────────────────────

    @staticmethod
    def pick(blocks: list[Block], number: int) -> Block | None:
        """Return one of some Blocks, if there is any."""
        return blocks[number % len(blocks)] if blocks else None

    def settle(self, block: Block, *, is_old: bool = False) -> None:
        """A Block that nothing names or copies stays while it can be found, and can be had."""
        if block in [copying.block for copying in self.copies] or block not in self.states:
            return
        if block.hash is None:
            self.forget(block)
            return
        state = self.states[block]
        if state is not State.HOST:
            self.device_lru.insert(0 if is_old else len(self.device_lru), block)
        if state is not State.DIRTY:
            self.host_lru.append(block)

    def unlist(self, block: Block, *, named: bool = False) -> None:
        """A Block can no longer be given up: a table names it, or a copy reads it."""
        for lru in (self.device_lru, self.host_lru):
            if block in lru:
                lru.remove(block)

    def forget(self, block: Block) -> None:
        """A Block is nowhere."""
        if self.findable.get(block.hash or b"") is block:
            del self.findable[block.hash or b""]
        self.findable = {key: other for key, other in self.findable.items() if other is not block}
        del self.states[block]
        self.unlist(block)

    def expect_device_place(self) -> None:
        """The oldest of the prefix cache goes from the device, where nothing is free."""
        if self.pool.device.num_free:
            return
        oldest = self.device_lru.pop(0)
        if self.states[oldest] is State.CLEAN:
            self.states[oldest] = State.HOST
        else:
            self.forget(oldest)

    def expect_host_place(self) -> None:
        """First what is free, then the prefix cache, then what is in use on the device as well."""
        if self.pool.host.num_free:
            return
        if not self.host_lru:
            self.states[self.saved_lru.pop()] = State.DIRTY
            return
        oldest = self.host_lru.pop(0)
        if self.states[oldest] is State.CLEAN:
            self.states[oldest] = State.DIRTY
        else:
            self.forget(oldest)

    def compare(self) -> None:
        """Hold the pool against the accounts."""
        pool, states = self.pool, self.states
        named = {block for block in self.names if block in states}
        copied = [copying.block for copying in self.copies]
        pool.check({*named, *self.names}, copied)
        assert all(block.state is state for block, state in states.items())
        assert all(block.refs == self.names.count(block) for block in states)
        assert all(block.wanted == self.wants.count(block) for block in states)
        assert all(pool.find(key) is self.findable.get(key) for key in HASHES)
        on_device = {block for block, state in states.items() if state in DEVICE_STATES}
        on_host = {block for block, state in states.items() if state in HOST_STATES}
        for block in states:
            assert (block.device_id != NO_PLACE) == (block in on_device)
            assert (block.host_id != NO_PLACE) == (block in on_host)
        assert pool.device.num_free == pool.device.num_blocks - len(on_device)
        assert pool.host.num_free == pool.host.num_blocks - len(on_host)
        assert list(pool.device.kept()) == self.device_lru
        assert list(pool.host.kept()) == self.host_lru
        assert list(pool._replacement._twins) == self.saved_lru
        self.compare_counts(named, on_device, on_host)

    def compare_counts(self, named: set[Block], on_device: set[Block], on_host: set[Block]) -> None:
        """On each tier free + cached + moving + used is the total."""
        pool, states = self.pool, self.states
        written = {b for b in on_device if states[b] in (State.LOADING, State.LEAVING)}
        held = {b for b in on_device - named if states[b] is State.SAVING}
        assert pool.device.num_cached == len(self.device_lru)
        assert pool.device.num_moving == len(written | held)
        assert pool.device.num_used == len((on_device & named) - written)
        assert pool.device.num_available == pool.device.num_free + pool.device.num_cached
        readable = {b for b in on_device & named if states[b] in ON_DEVICE}
        assert pool.num_unwanted == len(readable - set(self.wants))
        assert pool.num_away == len({b for b in named if states[b] in (State.HOST, State.LOADING)})
        arriving = {b for b in on_host if states[b] in (State.SAVING, State.LEAVING)}
        assert pool.host.num_cached == len(self.host_lru)
        assert pool.host.num_moving == len(arriving)
        assert pool.num_host_available == (
            pool.host.num_free + len(self.host_lru) + len(self.saved_lru)
        )
        total = pool.host.num_free + pool.host.num_cached + pool.host.num_moving
        assert pool.host.num_used == pool.host.num_blocks - total


OPERATIONS = (
    *(Model.take, Model.take, Model.publish, Model.publish, Model.retain, Model.release),
    *(Model.save, Model.leave, Model.stay, Model.drop, Model.load, Model.forget_host, Model.end),
    *(Model.want, Model.unwant, Model.unpublish),
)


@given(
    num_device=st.integers(1, 6),
    num_host=st.sampled_from((0, 0, 1, 2, 6)),
    turns=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 7)), max_size=80),
)
@settings(max_examples=600)
def test_pool_behaves_like_sets(num_device, num_host, turns) -> None:
    """Places are a partition, contents are found while they last, the oldest cached goes first."""
    model = Model(num_device, num_host)
    for operation, number in turns:
        operation(model, number)
        model.compare()
    while model.copies:
        model.end(1)
        model.compare()
    while model.names:
        model.release(0)
        model.compare()
    assert (model.pool.device.num_used, model.pool.device.num_moving) == (0, 0)
    assert (model.pool.host.num_used, model.pool.host.num_moving) == (0, 0)


def test_a_twin_is_not_published() -> None:
    """Of two blocks with equal content one can be found; the other's place is free at once."""
    pool = BlockPool(2)
    first, twin = taken(pool), taken(pool)
    pool.publish(first, b"x")
    pool.publish(twin, b"x")
    assert pool.find(b"x") is first
    pool.release(twin)
    assert (pool.device.num_free, pool.device.num_cached) == (1, 0)
    pool.release(first)
    assert (pool.device.num_free, pool.device.num_cached) == (1, 1)
    pool.check((), ())


def test_check_sees_a_leak_and_a_double_owner() -> None:
    """The check is not a formality."""
    pool = BlockPool(3)
    block = taken(pool)
    pool.check({block}, ())
    with pytest.raises(AssertionError):
        pool.check((), ())
    pool.device.give_back(block.device_id)
    with pytest.raises(AssertionError):
        pool.check({block}, ())


def test_a_store_that_failed_is_no_hit_on_the_host() -> None:
    """What did not arrive is on the device alone, and gone with its place there."""
    pool = BlockPool(1, 1)
    block = taken(pool, b"x")
    pool.save(block)
    pool.release(block)
    pool.save_failed(block)
    assert (block.state, pool.host.num_free) == (State.DIRTY, 1)
    assert pool.find(b"x") is block
    taken(pool)
    assert pool.find(b"x") is None


def test_a_load_that_failed_is_no_hit_on_either_tier() -> None:
    """Neither copy is trusted, and both places are free."""
    pool = BlockPool(1, 1)
    block = saved(pool, b"x")
    pool.drop(block)
    pool.load(block)
    pool.load_failed(block)
    assert pool.find(b"x") is None
    assert (pool.device.num_free, pool.host.num_free) == (1, 1)
    pool.release(block)
    pool.check((), ())


@pytest.mark.parametrize("has_failed", [False, True])
def test_places_come_back_when_the_copy_is_done_not_when_its_owner_ends(has_failed: bool) -> None:
    """Nobody names the block any more; the copy still reads one place and writes the other."""
    pool = BlockPool(2, 2)
    leaving, loading = taken(pool), taken(pool)
    pool.leave(loading)
    pool.saved(loading)
    pool.load(loading)
    pool.leave(leaving)
    for block in (leaving, loading):
        pool.release(block)
    assert (pool.device.num_available, pool.num_host_available) == (0, 0)
    assert (pool.device.num_moving, pool.host.num_moving) == (2, 1)
    pool.check((), (leaving, loading))
    (pool.save_failed if has_failed else pool.saved)(leaving)
    (pool.load_failed if has_failed else pool.loaded)(loading)
    assert (pool.device.num_free, pool.host.num_free) == (2, 2)
    pool.check((), ())
