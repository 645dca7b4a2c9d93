"""The grid of the workloads experiment."""

from __future__ import annotations

import json

import pytest

from experiments.workloads import PARTS, POLICIES, kept_figures, merged, seed_points
from tests.sim.machines import make_workload

ROWS = ((0.0, 10, 5), (1.0, 90, 50), (4.0, 20, 9))


def test_figures_of_parts_that_are_not_measured_anew_stay(tmp_path):
    """What is measured anew takes the place of what was there, and nothing else does."""
    file = tmp_path / "workloads.json"
    entries = [{"part": part, "policy": policy, "figure": 1}
               for part in ("policy", "kv") for policy in ("fcfs", "learned")]  # fmt: skip
    file.write_text(json.dumps({"figures": {"entries": entries, "kv": 1}}), encoding="utf-8")
    kept = kept_figures(file, ("kv", "seeds"), ("learned",))
    assert kept == {"entries": entries, "kv": 1}
    new = {"part": "kv", "policy": "learned", "figure": 2}
    first = {"part": "seeds", "policy": "learned", "seed": 1, "figure": 3}
    assert merged(kept["entries"], [first, new]) == [*entries[:3], new, first]


def test_nothing_is_kept_where_all_is_measured(tmp_path):
    """A first run has no file to read."""
    assert kept_figures(tmp_path / "none.json", PARTS, POLICIES) == {"entries": []}


def test_draws_of_one_seed_are_the_same_for_every_policy():
    """A ratio compares policies, not arrivals; logged arrivals are not drawn."""
    trace = make_workload(*ROWS)
    points = list(seed_points({"sharegpt": trace, "azure23_conv": trace},
                              {"sharegpt": 2.0, "azure23_conv": 2.0}))  # fmt: skip
    assert {point.labels["trace"] for point in points} == {"sharegpt"}
    for load, seed in {(point.labels["load"], point.labels["seed"]) for point in points}:
        mine = [p for p in points if (p.labels["load"], p.labels["seed"]) == (load, seed)]
        assert len({tuple(p.workload.arrived_at.tolist()) for p in mine}) == 1
        assert mine[0].workload.rate == pytest.approx(float(load) * 2.0)
