"""The traces of the workloads experiment, and what of them reaches a policy."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.workload_traces import at_load, prepared, redrawn, saturated_throughput
from tests.sim.machines import make_workload

ROWS = ((0.0, 10, 5), (1.0, 90, 50), (4.0, 200_000, 9))


def make_trace():
    """Return rows with every column; the last does not fit the window."""
    return make_workload(
        *ROWS, client=("a", "b", "c"), source=("s", "s", "s"), hash_ids=((1,), (1,), (2,)),
        session_id=np.array([1, 1, 1]), think_s=np.zeros(3),
    )  # fmt: skip


def test_a_trace_keeps_its_clients_and_loses_what_would_reuse_prefixes():
    """A policy is told who asks; the oversized row is dropped with its client."""
    plain = prepared("lmsys_arena27", make_trace())
    assert plain.client == ("a", "b")
    assert (plain.source, plain.hash_ids, plain.session_id, plain.think_s) == (None,) * 4
    assert (len(plain), plain.num_dropped) == (2, 1)


def test_beginnings_are_kept_where_they_are_what_is_measured():
    """Sessions are not: they would close the loop."""
    plain = prepared("mooncake_synth", make_trace(), keeps_prefixes=True)
    assert (plain.hash_ids, plain.session_id) == (((1,), (1,)), None)


def test_seed_zero_is_the_arrivals_of_the_trace_and_others_move_nothing_but_arrivals():
    """The same seed gives the same times; lengths stay where they are."""
    trace = make_trace()
    assert redrawn(trace, 0) is trace
    moved, again, other = redrawn(trace, 1), redrawn(trace, 1), redrawn(trace, 2)
    assert moved.arrived_at.tolist() == again.arrived_at.tolist() != other.arrived_at.tolist()
    assert moved.arrived_at.tolist() == sorted(moved.arrived_at.tolist())
    assert moved.output_tokens.tolist() == trace.output_tokens.tolist()


def test_a_load_is_a_share_of_capacity_whatever_rate_the_trace_has():
    """Draws of equal seed and other length have another rate."""
    trace = redrawn(make_trace(), 1)
    assert at_load(trace, 0.5, 8.0).rate == pytest.approx(4.0)


def test_throughput_leaves_out_the_batch_that_fills_and_the_one_that_empties():
    """Requests that end in step, but for a slow beginning and a slow end."""
    ends = [9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 99.0, 200.0]
    assert saturated_throughput(ends, max_num_seqs=2) == pytest.approx(5 / 5)
