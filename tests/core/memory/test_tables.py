"""Tables: when the Blocks of one that ends go, and what the check sees."""

from __future__ import annotations

import pytest

from fastserve.core.memory.claim import Claim
from fastserve.core.memory.pool import BlockPool
from fastserve.core.memory.tables import Tables
from tests.core.memory.caches import compute, make_cache, make_request


def test_blocks_wait_for_the_steps_that_touch_them() -> None:
    """A closed table gives its blocks back when the last of its steps has landed, not before."""
    cache = make_cache(4, is_enabled=False)
    request = make_request(0, list(range(10)))
    table = compute(cache, request, 10)
    table.steps_in_flight = 2
    cache.release(request)
    assert request.table is None
    assert (cache.num_left, cache.num_leaving, cache.num_tables) == (1, 3, 0)
    assert list(cache.holders()) == []
    cache.check([request])
    table.steps_in_flight = 1
    cache.landed(table)
    assert (cache.num_left, cache.num_leaving) == (1, 3)
    table.steps_in_flight = 0
    cache.landed(table)
    assert (cache.num_left, cache.num_leaving) == (4, 0)
    cache.check([request])


def test_shared_blocks_outlive_one_of_their_owners() -> None:
    """A block that two tables name stays until both are gone, then stays as cache, tail first."""
    cache = make_cache(4)
    first = make_request(0, list(range(12)))
    ids = [block.device_id for block in compute(cache, first, 12).blocks]
    second = make_request(1, list(range(9)))
    assert cache.claim(second, 9, {1}) is Claim.MET
    assert second.table is not None
    assert [block.device_id for block in second.table.blocks][:2] == ids[:2]
    cache.release(first)
    assert cache.num_left == 1
    cache.check([first, second])
    cache.release(second)
    assert cache.num_left == 4
    own, *cached = [cache.pool.take().device_id for _ in range(4)]
    assert own not in ids
    assert cached == [ids[2], ids[1], ids[0]]


def test_residents_are_in_the_order_of_holders() -> None:
    """One that was away and is back has its old place, and one that goes meanwhile is left out."""
    tables = Tables(BlockPool(8), 4)
    requests = [make_request(number, [number]) for number in range(4)]
    opened = [tables.open(request, []) for request in requests]
    assert list(tables.residents()) == list(tables.holders()) == requests
    tables.give_way(requests[1], opened[1])
    assert list(tables.residents()) == [requests[0], *requests[2:]]
    tables.want(opened[1], 0.0)
    tables.settle(opened[1])
    residents = tables.residents()
    assert [next(residents), next(residents)] == requests[:2]
    tables.close(requests[2])
    assert list(residents) == requests[3:]
    tables.check(requests)


def test_check_sees_a_table_without_an_owner() -> None:
    """The check is not a formality."""
    cache = make_cache()
    request = make_request(0, list(range(9)))
    table = compute(cache, request, 9)
    cache.check([request])
    with pytest.raises(AssertionError, match="no owner"):
        cache.check([])
    table.blocks.append(table.blocks[0])
    with pytest.raises(AssertionError):
        cache.check([request])
