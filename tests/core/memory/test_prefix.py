"""Prefixes: which cached Blocks a request begins with, and which it must not."""

from __future__ import annotations

import pytest

from fastserve.core.memory.claim import Claim
from tests.core.memory.caches import BLOCK_SIZE, compute, make_cache, make_request


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
