"""Workloads made against a policy that learns, and how it is judged on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from experiments.adversaries import (
    ADVERSARIES,
    Adversary,
    bursts,
    flipped,
    flooded,
    judge,
    overtaken_s,
    rare,
    table_of,
    thinned,
)
from experiments.harness import Result
from tests.sim.machines import make_workload


def make(name: str) -> Adversary:
    """Return one in full."""
    maker, count = ADVERSARIES[name]
    return maker(np.random.default_rng(0), count)


@pytest.mark.parametrize("name", ADVERSARIES)
def test_sections_part_the_requests_and_the_last_is_large_enough_for_a_tail(name):
    """A P99 of few requests is their maximum."""
    adversary = make(name)
    covered = np.sum(list(adversary.sections.values()), axis=0)
    assert covered.tolist() == [1] * len(adversary.workload)
    assert list(adversary.sections.values())[-1].sum() >= 500
    assert (np.diff(adversary.workload.arrived_at) >= 0).all()


def test_prompts_tell_the_opposite_after_the_flip():
    """What was learned in the first half is wrong in the second."""
    workload = flipped(np.random.default_rng(0), 10_000).workload
    is_short, is_brief = workload.prompt_tokens < 200, workload.output_tokens < 175
    assert not (is_short == is_brief)[:5000].any()
    assert (is_short == is_brief)[5000:].all()


def test_one_answer_of_a_hundred_is_long():
    """The share is drawn, not counted."""
    output = rare(np.random.default_rng(0), 4000).workload.output_tokens
    assert 20 < int((output == 5000).sum()) < 60
    assert set(output.tolist()) == {50, 5000}


def test_a_flood_is_half_of_the_requests_at_the_mean_rate_of_the_others():
    """Ten times the rate in a tenth of the time."""
    adversary = flooded(np.random.default_rng(0), 4000)
    workload, is_flood = adversary.workload, adversary.sections["the flood"]
    assert workload.client is not None
    assert [client == "flood" for client in workload.client] == is_flood.tolist()
    assert int(is_flood.sum()) == 2000
    assert bursts(np.array([0.0, 9.5, 10.5, 25.0])).tolist() == [0.0, 9.5, 100.5, 205.0]
    assert workload.arrived_at[is_flood][-1] == pytest.approx(2000, rel=0.1)
    assert (workload.output_tokens[is_flood] == 20).all()


def test_capacity_is_of_rows_from_all_of_a_workload():
    """The halves of one that changes differ in work."""
    workload = make("lengths flip at half-time").workload
    few = thinned(workload)
    assert 3000 < len(few) <= 4000
    assert few.arrived_at[-1] > workload.arrived_at[-20]


def test_a_row_is_overtaken_by_the_latest_arrival_that_began_before_it():
    """Against the definition, pair by pair."""
    rng = np.random.default_rng(0)
    arrived = np.sort(rng.integers(0, 20, 50)).astype(float)
    began = arrived + rng.integers(0, 10, 50).astype(float)
    naive = [max(arrived[began < began[row]].max(initial=0.0) - arrived[row], 0.0)
             for row in range(50)]  # fmt: skip
    found = overtaken_s(arrived, began).tolist()
    assert found == naive
    assert max(found) > 0
    assert overtaken_s(arrived, arrived + 1.0).tolist() == [0.0] * 50


def results(jct_s: list[float], policy: str) -> Result:
    """Return a run in which the first token took half of the time."""
    labels: dict[str, str | float | int] = {"workload": "w", "load": 0.9, "policy": policy}
    return Result(labels, {}, {"jct_s": jct_s, "ttft_s": [value / 2 for value in jct_s]})


def test_each_section_is_judged_against_fcfs_on_the_same_rows():
    """A gain before hides no loss after."""
    workload = make_workload((0.0, 1, 1), (1.0, 1, 1), (2.0, 1, 1), (3.0, 1, 1))
    early = np.array([True, True, False, False])
    adversary = Adversary(workload, {"early": early, "late": ~early})
    fcfs = results([2.0, 2.0, 2.0, 2.0], "fcfs")
    entries: list[Any] = []
    for policy, mine in (("learned", [1.0, 1.0, 2.0, 4.0]), ("skip-join-mlfq", [2.0] * 4)):
        entries += judge(adversary, workload.arrived_at, results(mine, policy), fcfs)
    gain, loss = entries[:2]
    assert (gain["mean_over_fcfs"], gain["passes"], gain["is_judged"]) == (0.5, True, False)
    assert (loss["mean_over_fcfs"], loss["passes"], loss["is_judged"]) == (1.5, False, True)
    assert (loss["latest_after_fcfs_s"], loss["longest_wait_s"]) == (2.0, 2.0)
    late = table_of(entries).splitlines()[-1]
    assert late == (
        "| w | 0.9 | late | 2 s | 1.00; 1.00; 0 s | **1.50**; **1.99**; 2 s | 0 s | **fail** |"
    )
