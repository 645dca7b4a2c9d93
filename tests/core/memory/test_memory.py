"""Claims and tables: what is shared, what is published, and when places come back."""

from __future__ import annotations

import pytest

from fastserve.core.memory.eviction import Defer
from fastserve.core.memory.memory import Claim, KVCacheManager
from fastserve.core.memory.pool import BlockPool
from fastserve.core.memory.table import BlockTable
from fastserve.core.memory.victims import VictimRanking
from fastserve.core.policies.fcfs import FCFS
from fastserve.core.request import Arrival, Handle, Request, SamplingParams

BLOCK_SIZE = 4


def make_request(handle: int, prompt: list[int], **params: int) -> Request:
    """Return a request that has done nothing yet."""
    arrival = Arrival(prompt, SamplingParams(**params))  # type: ignore[arg-type]
    return Request(Handle(handle), arrival, max_output_tokens=8)


def make_cache(num_blocks: int = 8, *, is_enabled: bool = True) -> KVCacheManager:
    """Return a manager over an empty pool that lets no request without KV take any."""
    return KVCacheManager(
        BlockPool(num_blocks),
        BLOCK_SIZE,
        VictimRanking(FCFS()),
        Defer(),
        enable_prefix_caching=is_enabled,
    )


def compute(cache: KVCacheManager, request: Request, num_tokens: int) -> BlockTable:
    """Claim the blocks of the first tokens and have them computed."""
    assert cache.claim(request, num_tokens, {request.handle}) is Claim.MET
    table = request.table
    assert table is not None
    request.num_scheduled_tokens = num_tokens
    cache.advance(request, table, num_tokens)
    return table


@pytest.mark.parametrize(("length", "num_hits"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (13, 2)])
def test_a_hit_leaves_a_token_to_compute(length: int, num_hits: int) -> None:
    """Only full blocks are shared, and never the whole prompt: its last logits are needed."""
    cache = make_cache()
    first = make_request(0, list(range(10)))
    compute(cache, first, 10)
    cache.release(first)
    second = make_request(1, list(range(length)))
    assert cache.probe(second) == num_hits * BLOCK_SIZE
    assert cache.claim(second, length, {1}) is Claim.MET
    assert second.num_computed_tokens == num_hits * BLOCK_SIZE
    cache.check([second])


def test_what_must_not_hit() -> None:
    """Other ids, caching off and scored prompts find nothing."""
    cache = make_cache()
    first = make_request(0, list(range(9)))
    compute(cache, first, 9)
    assert cache.probe(make_request(1, list(range(9))))
    assert not cache.probe(make_request(2, [9, *range(1, 9)]))
    assert not cache.probe(make_request(3, list(range(9)), prompt_logprobs=0))
    disabled = make_cache(is_enabled=False)
    compute(disabled, make_request(5, list(range(9))), 9)
    assert not disabled.probe(make_request(6, list(range(9))))


def test_the_same_block_behind_another_beginning_is_another_block() -> None:
    """Hashes are chained: content is the ids of a block and of all before it."""
    cache = make_cache()
    compute(cache, make_request(0, [1, 1, 1, 1, 7, 7, 7, 7, 9]), 9)
    assert cache.probe(make_request(1, [2, 2, 2, 2, 7, 7, 7, 7, 9])) == 0
    assert cache.probe(make_request(2, [1, 1, 1, 1, 7, 7, 7, 7, 9])) == 2 * BLOCK_SIZE


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


def test_what_a_request_finds_is_not_given_up_to_make_room_for_it() -> None:
    """Cached blocks that it begins with are no places for the rest of it: its claim stands."""
    cache = make_cache(4)
    first = make_request(0, list(range(9)))
    compute(cache, first, 8)
    cache.release(first)
    other = make_request(1, list(range(100, 108)))
    compute(cache, other, 8)
    assert (cache.pool.num_free, cache.pool.num_cached) == (0, 2)
    again = make_request(2, list(range(9)))
    assert cache.claim(again, 9, {1, 2}) is Claim.STANDS
    assert cache.probe(again) == 8
    cache.release(other)
    cache.begin_plan(1.0)
    assert cache.claim(again, 9, {2}) is Claim.MET
    assert again.num_computed_tokens == 8
    cache.check([again])


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
