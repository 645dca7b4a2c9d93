"""Block tables: what is shared, what is published, and when places come back."""

from __future__ import annotations

import pytest

from fastserve.core.memory.block import BlockPool
from fastserve.core.memory.memory import KVCacheManager
from fastserve.core.memory.table import BlockTable
from fastserve.core.request import Arrival, Request, SamplingParams

BLOCK_SIZE = 4


def make_request(handle: int, prompt: list[int], **params: int) -> Request:
    """Return a request that has done nothing yet."""
    arrival = Arrival(prompt, SamplingParams(**params))  # type: ignore[arg-type]
    return Request(handle, arrival, max_output_tokens=8)


def make_cache(
    num_blocks: int = 8, *, is_enabled: bool = True, salt: bytes = b""
) -> KVCacheManager:
    """Return a manager over an empty pool."""
    return KVCacheManager(
        BlockPool(num_blocks), BLOCK_SIZE, enable_prefix_caching=is_enabled, salt=salt
    )


def compute(cache: KVCacheManager, request: Request, num_tokens: int) -> BlockTable:
    """Open a table and have the first tokens computed."""
    table = cache.open(request)
    cache.grow(table, cache.num_blocks(num_tokens) - len(table.blocks))
    request.num_computed_tokens = request.num_scheduled_tokens = num_tokens
    cache.publish(request, table)
    return table


@pytest.mark.parametrize(("length", "num_hits"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (13, 2)])
def test_a_hit_leaves_a_token_to_compute(length: int, num_hits: int) -> None:
    """Only full blocks are shared, and never the whole prompt: its last logits are needed."""
    cache = make_cache()
    first = make_request(0, list(range(10)))
    cache.close(compute(cache, first, 10))
    second = make_request(1, list(range(length)))
    assert len(cache.match_prefix(second)) == num_hits
    cache.open(second)
    assert second.num_computed_tokens == num_hits * BLOCK_SIZE
    cache.check([second.table] if second.table else [])


def test_what_must_not_hit() -> None:
    """Other ids, another salt, caching off and scored prompts find nothing."""
    cache = make_cache()
    first = make_request(0, list(range(9)))
    compute(cache, first, 9)
    assert cache.match_prefix(make_request(1, list(range(9))))
    assert not cache.match_prefix(make_request(2, [9, *range(1, 9)]))
    assert not cache.match_prefix(make_request(3, list(range(9)), prompt_logprobs=0))
    hashes = [make_request(4, list(range(9))).block_hash(0, BLOCK_SIZE, s) for s in (b"", b"x")]
    assert hashes[0] != hashes[1]
    disabled = make_cache(is_enabled=False)
    compute(disabled, make_request(5, list(range(9))), 9)
    assert not disabled.match_prefix(make_request(6, list(range(9))))


def test_the_same_block_behind_another_beginning_is_another_block() -> None:
    """Hashes are chained: content is the ids of a block and of all before it."""
    cache = make_cache()
    compute(cache, make_request(0, [1, 1, 1, 1, 7, 7, 7, 7, 9]), 9)
    assert len(cache.match_prefix(make_request(1, [2, 2, 2, 2, 7, 7, 7, 7, 9]))) == 0
    assert len(cache.match_prefix(make_request(2, [1, 1, 1, 1, 7, 7, 7, 7, 9]))) == 2


def test_blocks_wait_for_the_steps_that_touch_them() -> None:
    """A closed table gives its blocks back when the last of its steps has landed, not before."""
    cache = make_cache(4, is_enabled=False)
    request = make_request(0, list(range(10)))
    table = compute(cache, request, 10)
    table.steps_in_flight = 2
    cache.close(table)
    request.table = None
    assert (cache.num_available, cache.num_leaving, cache.num_tables) == (1, 3, 0)
    assert list(cache.holders()) == []
    cache.check([])
    table.steps_in_flight = 1
    cache.land(table)
    assert (cache.num_available, cache.num_leaving) == (1, 3)
    table.steps_in_flight = 0
    cache.land(table)
    assert (cache.num_available, cache.num_leaving) == (4, 0)
    cache.check([])


def test_shared_blocks_outlive_one_of_their_owners() -> None:
    """A block that two tables name stays until both are gone, then stays as cache, tail first."""
    cache = make_cache(3)
    first = make_request(0, list(range(12)))
    table = compute(cache, first, 12)
    ids = [block.device_id for block in table.blocks]
    second = make_request(1, list(range(12)))
    shared = cache.open(second)
    assert [block.device_id for block in shared.blocks] == ids[:2]
    cache.close(table)
    first.table = None
    assert cache.num_available == 1
    cache.check([shared])
    cache.close(shared)
    second.table = None
    assert cache.num_available == 3
    assert [cache.pool.take().device_id for _ in range(3)] == [ids[2], ids[1], ids[0]]


def test_check_sees_a_table_without_an_owner() -> None:
    """The check is not a formality."""
    cache = make_cache()
    table = compute(cache, make_request(0, list(range(9))), 9)
    cache.check([table])
    with pytest.raises(AssertionError, match="no owner"):
        cache.check([])
    table.blocks.append(table.blocks[0])
    with pytest.raises(AssertionError):
        cache.check([table])
