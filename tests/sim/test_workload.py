"""Workloads: rows, windows, prompts that never collide, prefix blocks."""

from __future__ import annotations

import numpy as np
import pytest

from fastserve.sim.workload import WorkloadError, expand_hash_ids
from tests.sim.machines import make_workload

ROWS = ((0.0, 10, 5), (1.0, 90, 50), (4.0, 200, 9))


def test_rate_scale_changes_times_alone():
    """X times as many arrivals a second, lengths untouched."""
    workload = make_workload(*ROWS)
    faster = workload.faster(2.0)
    assert faster.arrived_at.tolist() == [0.0, 0.5, 2.0]
    assert faster.prompt_tokens.tolist() == workload.prompt_tokens.tolist()
    assert faster.rate == pytest.approx(2 * workload.rate) == pytest.approx(1.0)


def test_rate_of_one_row():
    """Without gaps the rate is taken as one a second."""
    assert make_workload(ROWS[0]).rate == 1.0


def test_first_rows_carry_every_column():
    """Array columns and tuple columns are cut alike; more than there are is all."""
    workload = make_workload(*ROWS, client=("a", "b", "c"), hash_ids=((1,), (2,), (3,)))
    first = workload.first(2)
    assert (len(first), first.client, first.hash_ids) == (2, ("a", "b"), ((1,), (2,)))
    assert len(workload.first(99)) == 3


def test_what_fits_is_left_alone():
    """A window that is large enough changes nothing, whatever is asked."""
    workload = make_workload(*ROWS)
    assert workload.fitted(209, "error") is workload


def test_an_oversized_row_is_named():
    """The first row that does not fit, and how many there are."""
    with pytest.raises(WorkloadError, match=r"row 2 needs 90 \+ 50 .* 100 \(2 of 3 rows"):
        make_workload(*ROWS).fitted(100, "error")


def test_oversized_rows_are_dropped_and_counted():
    """What does not fit is left out; dropping twice adds up."""
    fitted = make_workload(*ROWS).fitted(150, "drop")
    assert (len(fitted), fitted.num_dropped) == (2, 1)
    again = fitted.fitted(100, "drop")
    assert (len(again), again.num_dropped) == (1, 2)


def test_oversized_rows_are_clipped():
    """The answer is cut first, then the prompt; something is left of both."""
    fitted = make_workload(*ROWS).fitted(100, "clip")
    assert fitted.prompt_tokens.tolist() == [10, 90, 99]
    assert fitted.output_tokens.tolist() == [5, 10, 1]
    assert fitted.num_dropped == 0


def test_a_row_needs_what_it_may_ask_for():
    """With a limit of its own a row is as long as its limit."""
    workload = make_workload((0.0, 10, 5), max_tokens=np.array([95]))
    with pytest.raises(WorkloadError, match=r"10 \+ 95"):
        workload.fitted(100, "error")
    clipped = workload.fitted(100, "clip")
    assert clipped.max_tokens is not None
    assert (clipped.output_tokens[0], clipped.max_tokens[0]) == (5, 90)


def test_prompts_never_share_an_id():
    """No id occurs in two prompts, nor is it one that the device draws."""
    prompts = make_workload(*ROWS).prompts()
    ids = [token_id for row in range(3) for token_id in prompts[row]]
    assert [len(prompts[row]) for row in range(3)] == [10, 90, 200]
    assert len(set(ids)) == len(ids)
    assert min(ids) > 1
    assert prompts.block_hashes(0, 16) is None


def test_hash_ids_become_one_hash_per_full_block():
    """32 blocks of 16 for each id; only full blocks; equal beginnings have equal hashes."""
    ours = expand_hash_ids((7, 8), 1000, 16)
    theirs = expand_hash_ids((7, 9), 1024, 16)
    assert (len(ours), len(theirs)) == (62, 64)
    assert len(set(ours)) == 62
    assert ours[:32] == theirs[:32]
    assert not set(ours[32:]) & set(theirs[32:])
    assert len(expand_hash_ids((7,), 1000, 16)) == 32  # ids cover less than the prompt
    workload = make_workload((0.0, 1000, 1), hash_ids=((7, 8),))
    assert workload.prompts().block_hashes(0, 16) == ours


def test_turns_follow_each_other_within_a_session():
    """Each turn knows the next of its own session."""
    rows = [(float(at), 4, 4) for at in range(5)]
    workload = make_workload(*rows, session_id=np.array([1, 2, 1, 1, 2]), think_s=np.zeros(5))
    assert workload.next_turns() == {0: 2, 2: 3, 1: 4}
    assert make_workload(*rows).next_turns() == {}
