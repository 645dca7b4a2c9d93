"""The traces of the workloads experiment, and what of them reaches a policy."""

from __future__ import annotations

import numpy as np

from experiments.workloads import prepared
from tests.sim.machines import make_workload

ROWS = ((0.0, 10, 5), (1.0, 90, 50), (4.0, 200_000, 9))


def test_a_trace_keeps_its_clients_and_loses_what_would_reuse_prefixes():
    """A policy is told who asks; the oversized row is dropped with its client."""
    trace = make_workload(
        *ROWS, client=("a", "b", "c"), source=("s", "s", "s"), hash_ids=((1,), (1,), (2,)),
        session_id=np.array([1, 1, 1]), think_s=np.zeros(3),
    )  # fmt: skip
    plain = prepared("lmsys_arena27", trace)
    assert plain.client == ("a", "b")
    assert (plain.source, plain.hash_ids, plain.session_id, plain.think_s) == (None,) * 4
    assert (len(plain), plain.num_dropped) == (2, 1)
