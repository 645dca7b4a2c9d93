"""CostModel against numbers worked out by hand."""

from __future__ import annotations

import pytest

from fastserve.core.cost_model import CostModel

COST = CostModel(
    base_s=1.0,
    prefill_token_s=0.1,
    prefill_pair_s=0.01,
    decode_seq_s=0.5,
    decode_context_s=0.001,
    copy_base_s=2.0,
    copy_block_s=0.25,
)


def test_by_hand() -> None:
    """Every term is where it should be."""
    assert COST.min_iteration_s == pytest.approx(1.501)
    assert COST.iteration_s(1, 0) == pytest.approx(COST.min_iteration_s)
    assert COST.iteration_s(1, 99) == pytest.approx(1.0 + 0.5 + 0.1)
    assert COST.iteration_s(10, 0) == pytest.approx(1.0 + 1.0 + 0.01 * 10 * 5)
    assert COST.iteration_s(10, 20) == pytest.approx(1.0 + 1.0 + 0.01 * 10 * 25)
    assert COST.step_s([(1, 99), (10, 20)]) == pytest.approx(1.0 + 0.6 + 3.5)
    assert COST.copy_s(8) == pytest.approx(4.0)


@pytest.mark.parametrize("max_chunk", [1, 3, 7, 10, 100])
@pytest.mark.parametrize("start", [0, 5])
def test_chunks_cost_what_their_sum_costs(max_chunk: int, start: int) -> None:
    """A prefill in chunks costs the steps it takes; pairs add up whatever the cut."""
    total, position = 0.0, start
    while position < start + 10:
        num_tokens = min(max_chunk, start + 10 - position)
        pairs = num_tokens * (position + num_tokens / 2)
        total += 1.0 + 0.1 * num_tokens + 0.01 * pairs
        position += num_tokens
    assert COST.prefill_s(10, start, max_chunk) == pytest.approx(total)


def test_free_work_is_refused() -> None:
    """No quantum can be derived from a step that takes no time."""
    with pytest.raises(ValueError, match="positive"):
        CostModel(base_s=0.0, prefill_token_s=1.0)


def test_a_pipeline_s_share_is_all_but_the_copies() -> None:
    """With four steps in flight a step takes the machine a quarter of its seconds."""
    shares = [(1, 99), (10, 20)]
    assert COST.shared_by(4).step_s(shares) == pytest.approx(COST.step_s(shares) / 4)
    assert COST.shared_by(4).copy_s(8) == COST.copy_s(8)
    assert COST.shared_by(1) is COST
